// Rows of floats to integer codes with one scale for each row: what an output head is made of at load.
#pragma once

#include <vector>

#include "memory.h"
#include "row_table.h"
#include "threads.h"

namespace tritkit {

/// Some bits of all codes, in tiles: code = sum over the planes of bits << shift.
struct Plane {
    TileLayout layout;
    int shift;
    Bytes tiles;
};

/// weight[r][k] = scales[r] * (code[r][k] - offset), codes of 4 (T16-4), 6 (T16-4 and T16-2) or 8 bits (T16-8).
struct RowIntegers {
    int rows, columns, offset;
    std::vector<Plane> planes;
    std::vector<float> scales;  // [rows]
    std::vector<float> errors;  // [rows], with 4 bits: norm of what rounding has changed
};

/// Scales from the largest weight of a row; with 4 bits, from one of several shares of it, the one with the least
/// squared error. Throws std::invalid_argument for other bits and for rows that are not finite.
RowIntegers quantize_rows(const RowTable& source, int bits, Pool& pool, Arena& arena);

}  // namespace tritkit

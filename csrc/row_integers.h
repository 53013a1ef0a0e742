// Rows of floats to integer codes: what an output head is made of at load. With one scale for each row, or for each 32
// columns, which measured on SmolLM2-135M leaves a seventh of the divergence of 4 bits, and a quarter of that of 6.
#pragma once

#include <vector>

#include "group_sources.h"
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

/// weight[r][k] = scales[r] * (code[r][k] - offset), codes of 4 (T16-4) or 8 bits (T16-8).
struct RowIntegers {
    int rows, columns, offset;
    std::vector<Plane> planes;
    std::vector<float> scales;  // [rows]
    std::vector<float> errors;  // [rows], with 4 bits: norm of what rounding has changed
};

/// Scales from the largest weight of a row; with 4 bits, from one of several shares of it, the one with the least
/// squared error. Throws std::invalid_argument for other bits and for rows that are not finite.
RowIntegers quantize_rows(const RowTable& source, int bits, Pool& pool, Arena& arena);

/// The same rows with codes of 4 or 6 bits and a float16 scale for each 32 columns; with 4 bits it is, of several, the
/// one with the least squared error.
class RowGroups : public GroupSource {
 public:
    /// rows: outlives this. Throws std::invalid_argument for other bits.
    RowGroups(const RowTable& rows, int bits);

    bool read_span(int tile, int begin, int end, uint8_t* header, SpanCodes& codes) const override;
    std::string fault() const override { return "the rows hold a value that is not finite"; }

 private:
    const RowTable& table_;
    int bits_;
};

}  // namespace tritkit

// The table of kernels. Plain data only, so that nothing here can be compiled twice with different CPU flags.
//
// Run-time layouts "T16": tiles of 16 rows, each tile a run of 64-byte blocks along the columns; byte 4r+j of a block
// belongs to row r. One 32-bit broadcast of four activation codes then feeds 16 rows, and nothing is summed sideways.
// A byte holds the codes of columns that are 4 apart, "fields": field f is column first + 4f + j.
//   T16-1  32 columns a block; bit f of the byte
//   T16-2  16 columns; bits 2f..2f+1
//   T16-3  20 columns; ceil(256 / 243 * sum over f of code * 3^(4-f)), 1.6 bits a code, which is 0, 1 or 2
//   T16-4   8 columns; bits 4f..4f+3
//   T16-8   4 columns; the code itself
// Columns beyond the last one may hold any code: the activations there are zero.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "group_layout.h"
#include "line_table.h"
#include "vector_table.h"

namespace tritkit {

constexpr int kTileRows = 16;
constexpr int kBlockBytes = 64;
constexpr int kFloatPad = 16;  // float rows are padded with zeros to a multiple of this
// The sums of int32 hold for so many columns: 255 * 128 * 32767 * 2 < 2^31, and 256 * 2 * 128 * 32767 (T16-3).
constexpr int kMaxColumns = 32767;
constexpr int kPanelTiles = 4;  // at most so many tiles are unpacked at the same time

enum class TileLayout { kT16_1, kT16_2, kT16_3, kT16_4, kT16_8 };
constexpr int kTileLayouts = 5;

struct TileFacts {
    const char* name;
    int columns;  // of a block
    int levels;   // codes are 0 .. levels - 1
};
constexpr TileFacts kTileFacts[kTileLayouts] = {
    {"t16_1", 32, 2}, {"t16_2", 16, 4}, {"t16_3", 20, 3}, {"t16_4", 8, 16}, {"t16_8", 4, 256}};
constexpr const TileFacts& facts(TileLayout layout) { return kTileFacts[static_cast<int>(layout)]; }
inline int blocks_of(TileLayout layout, int columns) {
    return (columns + facts(layout).columns - 1) / facts(layout).columns;
}

/// Bytes from one row of int8 activation codes to the next: every layout may read to the end of its last block, or
/// line.
inline ptrdiff_t code_stride(int columns) { return ptrdiff_t{lines_of(columns)} * kLineEntries; }

/// Exact integer products of some tiles with some tokens: out[t][r - 16 * tile_begin] = (or +=)
/// sum over k of (2^shift * code[r][k] - offset) * x[t][k].
struct TileProduct {
    const uint8_t* weights;  // tile 0
    int blocks;              // blocks in a tile
    int tile_begin, tile_end;
    const int8_t* codes;  // [tokens, code_stride], zero beyond the last column
    ptrdiff_t code_stride;
    const int32_t* sums;  // [tokens], the sum of each token's codes
    int tokens;
    int32_t* out;  // [tokens, out_stride]
    ptrdiff_t out_stride;
    int shift, offset;
    bool accumulate;  // add to out
    uint8_t* panel;   // null, or aligned scratch: kPanelTiles tiles in T16-8
};

/// Float products of some rows with some tokens: out[t][r - row_begin] = sum over k of w[r][k] * x[t][k].
/// The order of the sum depends on the instruction set, never on the number of rows or tokens.
struct FloatProduct {
    const void* weights;   // row 0; float, or the bits of float16 or bfloat16
    ptrdiff_t row_stride;  // in elements
    int columns;           // a multiple of kFloatPad
    int row_begin, row_end;
    const float* x;  // [tokens, x_stride]
    ptrdiff_t x_stride;
    int tokens;
    float* out;  // [tokens, out_stride]
    ptrdiff_t out_stride;
};

struct Kernels {
    const char* isa;
    bool (*supported)();  // may this CPU run it?
    bool base3;           // is one token with T16-3 bound by memory, like one with T16-2, and so faster?

    // A null entry inherits from the row before in the table (dispatch.cpp).

    /// codes[i] = clamp(round_half_even(x[i] * inverse), -128, 127), inverse = levels / max(absmax, 1e-5).
    /// Stores the sum of the codes and returns the scale, 1 / inverse.
    float (*quantize_row)(const float* x, int columns, float levels, int8_t* codes, int32_t* sum);

    void (*matmul_tiles[kTileLayouts])(const TileProduct&);
    void (*matmul_f32)(const FloatProduct&);
    void (*matmul_f16)(const FloatProduct&);
    void (*matmul_bf16)(const FloatProduct&);

    const VectorKernels* vectors;

    // What the machine can do at best (machine.h).

    /// Reads `streams` (1, 2, 4 or 8) equal runs of data side by side, 64 bytes of each in turn, with a prefetch
    /// `ahead` bytes before each (0: none). bytes: a multiple of 64 * streams. Returns the xor of all 64-bit words.
    uint64_t (*read_stream)(const uint8_t* data, size_t bytes, int streams, int ahead);
    /// `rounds` times some of what the integer products consist of, on registers alone. Returns the operations that
    /// were done: two for each product of an activation code.
    int64_t (*integer_peak)(int64_t rounds);

    // --- Weights and activations in groups: group_layout.h.

    /// Each 32 columns: codes[i] = clamp(round_half_even(x[i] * inverse), -127, 127), inverse = 127 / max(absmax,
    /// 1e-5); the scale is 1 / inverse. Codes beyond the last column are zero.
    void (*quantize_groups)(const float* x, int columns, ActivationStrip* strips);

    void (*matmul_groups)(const GroupProduct&);

    const LineKernels* lines;
};

/// Names of the instruction sets that this CPU can run, slowest first.
std::vector<std::string> available_isas();

/// TRITKIT_ISA if it is set, else the fastest available one.
std::string default_isa();

/// The complete table of one instruction set; "" means default_isa(). Throws std::invalid_argument.
const Kernels& kernels_for(const std::string& isa);

}  // namespace tritkit

// The table of kernels. Plain data only, so that nothing here can be compiled twice with different CPU flags.
//
// Run-time layouts "T16": tiles of 16 rows, each tile a run of 64-byte blocks along the columns; byte 4r+j of a block
// belongs to row r. One 32-bit broadcast of four activation codes then feeds 16 rows, and nothing is summed sideways.
//   T16-2 (ternary): a block spans 16 columns; bits 2f..2f+1 of byte (r, j) = code + 1 of column 16b + 4f + j.
//   T16-1 (binary):  a block spans 32 columns; bit f of byte (r, j) = "code is +1" of column 32b + 4f + j.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "vector_table.h"

namespace tritkit {

constexpr int kTileRows = 16;
constexpr int kBlockBytes = 64;
constexpr int kTernaryColumns = 16;  // columns of a T16-2 block
constexpr int kBinaryColumns = 32;   // columns of a T16-1 block
constexpr int kFloatPad = 16;        // float rows are padded with zeros to a multiple of this
constexpr int kCodePad = 64;         // int8 rows likewise

/// Exact integer products of some tiles with some tokens: out[t][r - 16 * tile_begin] = sum over k of w[r][k] *
/// x[t][k].
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

    // A null entry inherits from the row before in the table (dispatch.cpp).

    /// codes[i] = clamp(round_half_even(x[i] * inverse), -128, 127), inverse = levels / max(absmax, 1e-5).
    /// Stores the sum of the codes and returns the scale, 1 / inverse.
    float (*quantize_row)(const float* x, int columns, float levels, int8_t* codes, int32_t* sum);

    void (*matmul_ternary)(const TileProduct&);
    void (*matmul_binary)(const TileProduct&);
    void (*matmul_f32)(const FloatProduct&);
    void (*matmul_f16)(const FloatProduct&);
    void (*matmul_bf16)(const FloatProduct&);

    const VectorKernels* vectors;
};

/// Names of the instruction sets that this CPU can run, slowest first.
std::vector<std::string> available_isas();

/// TRITKIT_ISA if it is set, else the fastest available one.
std::string default_isa();

/// The complete table of one instruction set; "" means default_isa(). Throws std::invalid_argument.
const Kernels& kernels_for(const std::string& isa);

}  // namespace tritkit

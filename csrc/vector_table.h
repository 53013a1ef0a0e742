// What is written once, over vectors of 16 floats, and compiled for every instruction set: attention and the
// element-wise work between the linears. The order of every sum is part of the definition, so all instruction sets
// give the same bits. Plain data only, like kernels.h.
//
// The keys and values of one layer and head in one page of 64 positions are two matrices in tiles of 16 rows: K has a
// row for each position and a column for each dimension, V the other way round. So neither product needs sums
// sideways, and both are one kernel: 16 rows at once, one column (floats) or four (codes) after the other. A step of a
// tile holds, byte 4r + j of each 64-byte block belonging to row r:
//   32, 16 bits  one column:  16 floats
//   8 bits       4 columns:   byte (r, j) = code of column j
//   4 bits       8 columns:   bits 4f..4f+3 of byte (r, j) = code of column 4f + j
//   3 bits       32 columns:  two blocks with bits 0..1 (bits 2f..2f+1 = column 16 * block + 4f + j), then
//                             one with bit 2 (bit f = column 4f + j)
// A code u of b bits stands for scale * (u - (2^b - 1) / 2): all codes are used, symmetric about zero, and the error is
// at most half a scale, absmax / (2^b - 1). Each position has one float16 scale for its key and one for its value.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tritkit {

constexpr int kPagePositions = 64;
constexpr int kRangePages = 4;
constexpr int kRangePositions = kRangePages * kPagePositions;  // softmax is summed up over these, then over ranges
constexpr int kLanes = 16;

/// Where things are in the block of one layer and head of a page.
struct KvLayout {
    int bits, head_dim;
    int key_steps;                                      // of a tile: columns are dimensions
    int value_steps;                                    // of a tile in 64 columns: positions
    int value_tiles;                                    // head_dim / 16, rounded up
    ptrdiff_t key_tile, value_tile;                     // bytes of a tile
    ptrdiff_t key_scales, value_scales, values, bytes;  // offsets; keys are at 0
    /// The first position once more, at 8 bits, where a page has 4 or 3: [key codes][value codes][2 scales].
    ptrdiff_t first_values, first_scales, first_bytes;
};

/// A part of softmax(q k^T) v: `out` [value_tiles * 16] without its denominator, then highest and total.
constexpr int kPartialExtra = kLanes;

/// Some query rows of one kv head against one range of positions. Row r belongs to token r / group and sees
/// min(visible + r / group, kRangePositions) positions, at least one.
struct RangeWork {
    const KvLayout* layout;
    const uint8_t* const* pages;  // the head's block in each page that is seen
    const uint8_t* const* next;   // what will probably be read afterwards, as many pages; entries may be null
    const uint8_t* first;         // the first position at 8 bits; null in later ranges and at other widths
    int rows, group, visible;
    float scaling;
    const float* queries;  // 32 and 16 bits: [rows, query_stride]
    const int8_t* codes;   // else: [rows, query_stride], zero beyond head_dim
    const float* scales;   // [rows]
    const int32_t* sums;   // [rows], of the codes
    ptrdiff_t query_stride;
    float* scores;         // scratch, [rows, kRangePositions]
    int8_t* weights;       // scratch, [2 * rows, kRangePositions]
    int32_t* products;     // scratch, [2 * rows, value_tiles * 16]
    int32_t* weight_sums;  // scratch, [rows]
    float* partial;        // result, [rows, value_tiles * 16 + kPartialExtra]
};

struct VectorKernels {
    /// A row of n floats as codes of `bits` (8, 4, 3: uint8_t each; 16: float16), padded to a multiple of 16; returns
    /// the bits of the float16 scale.
    uint16_t (*encode)(const float* x, int n, int bits, void* out);
    void (*attend_range)(const RangeWork&);
    /// into += part, the later range; [rows, size + kPartialExtra] each.
    void (*merge_partials)(float* into, const float* part, int rows, int size);

    /// out = weight * x / sqrt(mean(x^2) + eps); out may be x.
    void (*rms_norm)(const float* x, const float* weight, int n, float eps, float* out);
    /// gate = silu(gate) * up, gate = max(gate, 0)^2 * up.
    void (*silu_gate)(float* gate, const float* up, int n);
    void (*relu2_gate)(float* gate, const float* up, int n);
    /// log(sum(exp(x))).
    double (*log_sum_exp)(const float* x, int n);
};

}  // namespace tritkit

// The blocks in which ggml (llama.cpp, GGUF files) and bitnet.cpp store the columns of a row, and what is in them.
//
// A row is whole blocks, one behind the other; numbers are little-endian. d and m: float16; q: codes; [n]: n bytes.
//   q4_0  32 columns  d | low and high nibbles of 16 bytes: columns 0..15, 16..31      d (q - 8)
//   q4_1              d | m | the same                                                  d q + m
//   q5_0              d | fifth bits [4] | the same                                     d (q - 16)
//   q5_1              d | m | fifth bits [4] | the same                                 d q + m
//   q8_0              d | int8 [32]                                                     d q
//   q2_k  256         scales and mins [16] | 2 bits [64] | d | m                        d scale q - m min
//   q3_k              third bits [32] | 2 bits [64] | scales of 6 bits [12] | d         d (scale - 32) (q - 4)
//   q4_k              d | m | scales and mins of 6 bits [12] | nibbles [128]            d scale q - m min
//   q5_k              d | m | scales and mins [12] | fifth bits [32] | nibbles [128]    d scale q - m min
//   q6_k              nibbles [128] | 2 high bits [64] | int8 scales [16] | d           d scale (q - 32)
//   tq1_0             5 trits a byte [48] | 4 trits a byte [4] | d                      d (q - 1)
//   tq2_0             2 bits [64] | d                                                   d (q - 1)
//   i2_s_x86   128    2 bits [32]                                                       q - 1
//   i2_s_arm    64    2 bits [16]                                                       q - 1
// The scale of i2_s is a float behind the matrix. Which of its two orders a file has depends on who wrote it.
#pragma once

#include <cstdint>
#include <vector>

#include "group_layout.h"

namespace tritkit {

constexpr int kLargestBlock = 256;

/// A block taken apart.
struct Block {
    uint8_t codes[kLargestBlock];
    uint16_t d, m;       // float16
    uint8_t scales[16];  // of the groups, int8; only with two levels
    uint8_t mins[16];
};

struct BlockType {
    const char* name;
    int columns, bytes;
    // As the kernels for groups take them (group_layout.h).
    GroupCodes codes;
    GroupScales scales;
    GroupOffsets offsets;
    int group;
    int bias_bits;   // a code stands for code - 2^bias_bits; -1: for itself
    bool has_scale;  // else d is always one
    void (*unpack)(const uint8_t* bytes, Block& block);

    bool ternary() const { return bias_bits == 0; }
};

const std::vector<BlockType>& block_types();

/// The run-time layout of a matrix of them.
GroupLayout group_layout(const BlockType& type, int columns);

/// Whether d and m are numbers.
bool is_finite(const BlockType& type, const Block& block);

/// The floats that the columns of a block stand for, in the order of operations of ggml.
void dequantize(const BlockType& type, const Block& block, float* out);

}  // namespace tritkit

#include "ggml_blocks.h"

#include <cstring>

#include "floats.h"

namespace tritkit {
namespace {

constexpr uint16_t kOne = 0x3c00;  // as float16

uint16_t half_at(const uint8_t* at) {
    uint16_t bits;
    std::memcpy(&bits, at, sizeof bits);
    return bits;
}

/// Bytes of two nibbles: the low ones are `count` columns, the high ones the next `count`.
void unpack_nibbles(const uint8_t* from, int count, uint8_t* codes) {
    for (int i = 0; i < count; ++i) {
        codes[i] = from[i] & 15;
        codes[i + count] = from[i] >> 4;
    }
}

/// Bytes of four codes: field f belongs to the f-th `count` columns.
void unpack_quarters(const uint8_t* from, int count, uint8_t* codes) {
    for (int f = 0; f < 4; ++f)
        for (int i = 0; i < count; ++i) codes[f * count + i] = from[i] >> (2 * f) & 3;
}

/// Bit j of 32 is the fifth of column j.
void add_fifth_bits(const uint8_t* from, uint8_t* codes) {
    uint32_t bits;
    std::memcpy(&bits, from, sizeof bits);
    for (int j = 0; j < 32; ++j) codes[j] = static_cast<uint8_t>(codes[j] | (bits >> j & 1) << 4);
}

void unpack_q4_0(const uint8_t* b, Block& out) {
    out.d = half_at(b);
    unpack_nibbles(b + 2, 16, out.codes);
}

void unpack_q4_1(const uint8_t* b, Block& out) {
    out.d = half_at(b);
    out.m = half_at(b + 2);
    unpack_nibbles(b + 4, 16, out.codes);
}

void unpack_q5_0(const uint8_t* b, Block& out) {
    out.d = half_at(b);
    unpack_nibbles(b + 6, 16, out.codes);
    add_fifth_bits(b + 2, out.codes);
}

void unpack_q5_1(const uint8_t* b, Block& out) {
    out.d = half_at(b);
    out.m = half_at(b + 2);
    unpack_nibbles(b + 8, 16, out.codes);
    add_fifth_bits(b + 4, out.codes);
}

void unpack_q8_0(const uint8_t* b, Block& out) {
    out.d = half_at(b);
    for (int j = 0; j < 32; ++j) out.codes[j] = b[2 + j] ^ 128;  // code + 128
}

void unpack_q2_k(const uint8_t* b, Block& out) {
    for (int g = 0; g < 16; ++g) {
        out.scales[g] = b[g] & 15;
        out.mins[g] = b[g] >> 4;
    }
    for (int half = 0; half < 2; ++half) unpack_quarters(b + 16 + 32 * half, 32, out.codes + 128 * half);
    out.d = half_at(b + 80);
    out.m = half_at(b + 82);
}

/// The third bit is worth 4, and 4 is what a code is too large by. 16 scales of 6 bits: their low 4 bits are the low
/// nibbles of 8 bytes, then the high ones; bits 2f..2f+1 of byte 8 + i are the high ones of scale 4f + i.
void unpack_q3_k(const uint8_t* b, Block& out) {
    for (int half = 0; half < 2; ++half) unpack_quarters(b + 32 + 32 * half, 32, out.codes + 128 * half);
    for (int f = 0; f < 8; ++f)
        for (int i = 0; i < 32; ++i)
            out.codes[32 * f + i] = static_cast<uint8_t>(out.codes[32 * f + i] | (b[i] >> f & 1) << 2);
    const uint8_t* packed = b + 96;
    for (int g = 0; g < 16; ++g) {
        const int low = packed[g % 8] >> (g / 8 * 4) & 15, high = packed[8 + g % 4] >> (g / 4 * 2) & 3;
        out.scales[g] = static_cast<uint8_t>((low | high << 4) - 32);
    }
    out.d = half_at(b + 108);
}

/// 8 scales and 8 mins of 6 bits: four bytes of scales, four of mins, and four with nibbles of the other scales and
/// mins, whose high bits are those of the first eight bytes.
void unpack_six_bits(const uint8_t* packed, Block& out) {
    for (int i = 0; i < 4; ++i) {
        const uint8_t scale = packed[i], min = packed[4 + i], rest = packed[8 + i];
        out.scales[i] = scale & 63;
        out.mins[i] = min & 63;
        out.scales[4 + i] = static_cast<uint8_t>((rest & 15) | (scale >> 6) << 4);
        out.mins[4 + i] = static_cast<uint8_t>(rest >> 4 | (min >> 6) << 4);
    }
}

void unpack_q4_k(const uint8_t* b, Block& out) {
    out.d = half_at(b);
    out.m = half_at(b + 2);
    unpack_six_bits(b + 4, out);
    for (int c = 0; c < 4; ++c) unpack_nibbles(b + 16 + 32 * c, 32, out.codes + 64 * c);
}

void unpack_q5_k(const uint8_t* b, Block& out) {
    out.d = half_at(b);
    out.m = half_at(b + 2);
    unpack_six_bits(b + 4, out);
    for (int c = 0; c < 4; ++c) unpack_nibbles(b + 48 + 32 * c, 32, out.codes + 64 * c);
    for (int f = 0; f < 8; ++f)
        for (int i = 0; i < 32; ++i)
            out.codes[32 * f + i] = static_cast<uint8_t>(out.codes[32 * f + i] | (b[16 + i] >> f & 1) << 4);
}

void unpack_q6_k(const uint8_t* b, Block& out) {
    for (int half = 0; half < 2; ++half) {
        uint8_t* codes = out.codes + 128 * half;
        uint8_t high[128];
        unpack_nibbles(b + 64 * half, 64, codes);
        unpack_quarters(b + 128 + 32 * half, 32, high);
        for (int i = 0; i < 128; ++i) codes[i] = static_cast<uint8_t>(codes[i] | high[i] << 4);
    }
    std::memcpy(out.scales, b + 192, 16);
    out.d = half_at(b + 208);
}

/// A byte is a fraction of 256: each trit comes out at the top when it is multiplied by 3. Trit n belongs to the n-th
/// `count` columns.
void unpack_trits(const uint8_t* from, int count, int trits, uint8_t* codes) {
    for (int i = 0; i < count; ++i) {
        unsigned fraction = from[i];
        for (int n = 0; n < trits; ++n) {
            codes[n * count + i] = static_cast<uint8_t>(fraction * 3 >> 8);
            fraction = fraction * 3 & 255;
        }
    }
}

void unpack_tq1_0(const uint8_t* b, Block& out) {
    unpack_trits(b, 32, 5, out.codes);
    unpack_trits(b + 32, 16, 5, out.codes + 160);
    unpack_trits(b + 48, 4, 4, out.codes + 240);
    out.d = half_at(b + 52);
}

void unpack_tq2_0(const uint8_t* b, Block& out) {
    for (int half = 0; half < 2; ++half) unpack_quarters(b + 32 * half, 32, out.codes + 128 * half);
    out.d = half_at(b + 64);
}

/// The first `count` columns are the highest bits.
template <int count>
void unpack_i2_s(const uint8_t* b, Block& out) {
    for (int f = 0; f < 4; ++f)
        for (int i = 0; i < count; ++i) out.codes[f * count + i] = b[i] >> (6 - 2 * f) & 3;
    out.d = kOne;
}

bool is_finite(uint16_t half) { return (half & 0x7c00) != 0x7c00; }

}  // namespace

const std::vector<BlockType>& block_types() {
    using C = GroupCodes;
    using S = GroupScales;
    using O = GroupOffsets;
    // A new type is one function and one row here.
    static const std::vector<BlockType> types = {
        {"q4_0", 32, 18, C::k4, S::kHalf, O::kNone, 32, 3, true, unpack_q4_0},
        {"q4_1", 32, 20, C::k4, S::kHalf, O::kHalf, 32, -1, true, unpack_q4_1},
        {"q5_0", 32, 22, C::k5, S::kHalf, O::kNone, 32, 4, true, unpack_q5_0},
        {"q5_1", 32, 24, C::k5, S::kHalf, O::kHalf, 32, -1, true, unpack_q5_1},
        {"q8_0", 32, 34, C::k8, S::kHalf, O::kNone, 32, 7, true, unpack_q8_0},
        {"q2_k", 256, 84, C::k2, S::kTwoLevel4, O::kMins, 16, -1, true, unpack_q2_k},
        {"q3_k", 256, 110, C::k3, S::kTwoLevel, O::kNone, 16, 2, true, unpack_q3_k},
        {"q4_k", 256, 144, C::k4, S::kTwoLevel, O::kMins, 32, -1, true, unpack_q4_k},
        {"q5_k", 256, 176, C::k5, S::kTwoLevel, O::kMins, 32, -1, true, unpack_q5_k},
        {"q6_k", 256, 210, C::k6, S::kTwoLevel, O::kNone, 16, 5, true, unpack_q6_k},
        {"tq1_0", 256, 54, C::k2, S::kHalf, O::kNone, 256, 0, true, unpack_tq1_0},
        {"tq2_0", 256, 66, C::k2, S::kHalf, O::kNone, 256, 0, true, unpack_tq2_0},
        {"i2_s_x86", 128, 32, C::k2, S::kHalf, O::kNone, 128, 0, false, unpack_i2_s<32>},
        {"i2_s_arm", 64, 16, C::k2, S::kHalf, O::kNone, 64, 0, false, unpack_i2_s<16>},
    };
    return types;
}

GroupLayout group_layout(const BlockType& type, int columns) {
    const int padded = (columns + kStripColumns - 1) / kStripColumns * kStripColumns;
    return {type.codes, type.scales, type.offsets, padded, type.group};
}

bool is_finite(const BlockType& type, const Block& block) {
    return is_finite(block.d) && (type.offsets == GroupOffsets::kNone || is_finite(block.m));
}

void dequantize(const BlockType& type, const Block& block, float* out) {
    const float d = float_from_f16(block.d), m = float_from_f16(block.m);
    const int bias = type.bias_bits < 0 ? 0 : 1 << type.bias_bits;
    for (int begin = 0, g = 0; begin < type.columns; begin += type.group, ++g) {
        const float scale = type.scales == GroupScales::kHalf ? d : d * static_cast<int8_t>(block.scales[g]);
        const float offset = type.offsets == GroupOffsets::kHalf ? m : -(m * block.mins[g]);
        for (int k = begin; k < begin + type.group; ++k) out[k] = scale * static_cast<float>(block.codes[k] - bias);
        if (type.offsets != GroupOffsets::kNone)
            for (int k = begin; k < begin + type.group; ++k) out[k] += offset;
    }
}

}  // namespace tritkit

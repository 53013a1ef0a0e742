// Codes and float16 numbers as ggml's blocks hold them: the other way round from ggml_blocks.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "floats.h"

namespace tritkit::ggml {

/// The nearest float16; infinity beyond its range, which quantisers refuse afterwards.
inline uint16_t half_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    return size >= 0x477ff000 ? static_cast<uint16_t>(sign | 0x7c00) : f16_from_float(x);
}

inline void put_half(uint8_t* at, float x) {
    const uint16_t bits = half_of(x);
    std::memcpy(at, &bits, sizeof bits);
}

/// Bytes of two codes: the first `count`, and above them the next `count`.
inline void put_nibbles(const uint8_t* codes, int count, uint8_t* out) {
    for (int i = 0; i < count; ++i) out[i] = static_cast<uint8_t>((codes[i] & 15) | codes[i + count] << 4);
}

/// Bytes of four codes of two bits, which lie above the first `shift` ones of `codes`.
inline void put_quarters(const uint8_t* codes, int count, int shift, uint8_t* out) {
    for (int i = 0; i < count; ++i) {
        int byte = 0;
        for (int f = 0; f < 4; ++f) byte |= (codes[f * count + i] >> shift & 3) << (2 * f);
        out[i] = static_cast<uint8_t>(byte);
    }
}

/// Bytes of one bit, number `shift`, of eight times `count` codes.
inline void put_bits(const uint8_t* codes, int count, int shift, uint8_t* out) {
    for (int i = 0; i < count; ++i) {
        int byte = 0;
        for (int f = 0; f < 8; ++f) byte |= (codes[f * count + i] >> shift & 1) << f;
        out[i] = static_cast<uint8_t>(byte);
    }
}

/// Scales and minima of 6 bits. Larger ones spoil their neighbours, as they do in ggml.
inline void put_six_bits(const uint8_t* scales, const uint8_t* mins, uint8_t* out) {
    for (int i = 0; i < 4; ++i) {
        const int scale = scales[4 + i], min = mins[4 + i];
        out[i] = static_cast<uint8_t>(scales[i] | scale >> 4 << 6);
        out[4 + i] = static_cast<uint8_t>(mins[i] | min >> 4 << 6);
        out[8 + i] = static_cast<uint8_t>((scale & 15) | (min & 15) << 4);
    }
}

}  // namespace tritkit::ggml

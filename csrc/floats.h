// The 16-bit float formats, from their bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace tritkit {

inline float float_from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

/// bfloat16 is the upper half of a float.
inline float float_from_bf16(uint16_t bits) { return float_from_bits(static_cast<uint32_t>(bits) << 16); }

/// IEEE binary16: 1 sign, 5 exponent (bias 15), 10 mantissa bits.
inline float float_from_f16(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 31) return float_from_bits(sign | 0x7f800000u | mantissa << 13);  // infinity, not a number
    if (exponent != 0) return float_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
    const float tiny = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal or zero
    return sign ? -tiny : tiny;
}

/// The nearest binary16, halves to even; beyond its range the largest finite one.
inline uint16_t f16_from_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7bff);  // rounds to more than 65504
    if (size < 0x38800000) {                                              // subnormal: whole multiples of 2^-24
        float scaled;
        std::memcpy(&scaled, &size, sizeof scaled);
        return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyintf(scaled * 0x1p24f)));
    }
    const uint32_t odd = size >> 13 & 1;
    return static_cast<uint16_t>(sign | ((size - 0x38000000 + 0xfff + odd) >> 13));
}

/// Rounds halves to even, as adding and taking away 1.5 * 2^23 does; |value| < 2^22. Written so that it vectorizes.
inline int round_to_int(float value) {
    const float shifted = value + 12582912.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    return bits - 0x4b400000;
}

}  // namespace tritkit

// The types without levels: q4_0 to q8_0, whose blocks are 32 columns, and the ternary ones.
#include <algorithm>

#include "ggml_quantize.h"
#include "ggml_quantize_bytes.h"
#include "ggml_quantize_search.h"

namespace tritkit::ggml {
namespace {

constexpr int kSmall = 32;

/// 1 / d, and 0 for 0.
float inverse_of(float d) { return d != 0 ? 1.0f / d : 0.0f; }

/// The byte of an integer part; 0 for what no integer holds, as x86 has it.
uint8_t integer_part(float x) {
    return std::fabs(x) < 2147483648.0f ? static_cast<uint8_t>(static_cast<int32_t>(x)) : uint8_t{0};
}

float widest_of(const float* x, int count) {
    float widest = 0;
    for (int i = 0; i < count; ++i) widest = std::max(widest, std::fabs(x[i]));
    return widest;
}

/// d, the minimum for types that have one, fifth bits of five-bit codes, and four bits of each code.
template <int kBits, bool kMin>
void put_block(float d, float min, const uint8_t* codes, uint8_t* out) {
    put_half(out, d);
    out += 2;
    if (kMin) {
        put_half(out, min);
        out += 2;
    }
    if (kBits == 5) {
        for (int i = 0; i < 4; ++i) {
            int byte = 0;
            for (int bit = 0; bit < 8; ++bit) byte |= (codes[8 * i + bit] >> 4 & 1) << bit;
            out[i] = static_cast<uint8_t>(byte);
        }
        out += 4;
    }
    put_nibbles(codes, kSmall / 2, out);
}

/// The value of largest size becomes the lowest code.
template <int kBits>
void round_signed(const float* x, uint8_t* out) {
    constexpr int top = 1 << (kBits - 1);
    float widest = 0, largest = 0;
    for (int i = 0; i < kSmall; ++i)
        if (widest < std::fabs(x[i])) widest = std::fabs(x[i]), largest = x[i];
    const float d = largest / -top, inverse = inverse_of(d);
    uint8_t codes[kSmall];
    for (int i = 0; i < kSmall; ++i) {
        const int code = static_cast<int8_t>(integer_part(x[i] * inverse + (top + 0.5f)));
        codes[i] = static_cast<uint8_t>(std::min(code, 2 * top - 1));
    }
    put_block<kBits, false>(d, 0, codes, out);
}

/// The smallest value is code 0, the largest the last one.
template <int kBits>
void round_with_min(const float* x, uint8_t* out) {
    constexpr int top = (1 << kBits) - 1;
    const float low = *std::min_element(x, x + kSmall), high = *std::max_element(x, x + kSmall);
    const float d = (high - low) / top, inverse = inverse_of(d);
    uint8_t codes[kSmall];
    for (int i = 0; i < kSmall; ++i)
        codes[i] = static_cast<uint8_t>(std::min<int>(integer_part((x[i] - low) * inverse + 0.5f), top));
    put_block<kBits, true>(d, low, codes, out);
}

/// Values weighed by the importance of their column and by their size, blocks side by side.
template <int kBits, bool kMin>
void search_row(const float* x, const float* importance, int columns, int block_bytes, uint8_t* out) {
    float squares = 0;
    for (int i = 0; i < columns; ++i) squares += x[i] * x[i];
    const float variance = squares / static_cast<float>(columns);
    const int blocks = columns / kSmall;
    for (int b = 0; b < blocks; b += kLanes) {
        Floats v[kSmall], w[kSmall], codes[kSmall], min = {}, d;
        for (int k = 0; k < kLanes; ++k) {
            const int from = std::min(b + k, blocks - 1) * kSmall;  // the last one again where there are no more
            for (int i = 0; i < kSmall; ++i) {
                v[i][k] = x[from + i];
                w[i][k] = importance[from + i] * std::sqrt(variance + x[from + i] * x[from + i]);
            }
        }
        if constexpr (kMin)
            d = search_scale_and_min<false>(v, w, MinSearch{(1 << kBits) - 1, -0.9f, 0.05f, 36}, min, codes);
        else
            d = search_scale(v, w, 1 << (kBits - 1), codes);
        for (int k = 0; k < std::min(kLanes, blocks - b); ++k) {
            uint8_t found[kSmall];
            for (int i = 0; i < kSmall; ++i) found[i] = static_cast<uint8_t>(codes[i][k]);
            put_block<kBits, kMin>(d[k], -min[k], found, out + (b + k) * block_bytes);
        }
    }
}

template <int kBits, bool kMin>
void small_row(const float* x, const float* importance, int columns, uint8_t* out) {
    constexpr int block_bytes = 2 + 2 * kMin + 4 * kBits;
    if (importance) return search_row<kBits, kMin>(x, importance, columns, block_bytes, out);
    for (int at = 0; at < columns; at += kSmall, out += block_bytes) {
        if constexpr (kMin)
            round_with_min<kBits>(x + at, out);
        else
            round_signed<kBits>(x + at, out);
    }
}

/// -1, 0 or 1, plus one, of a block of 256: the largest value is its scale, and half of it the threshold.
float round_ternary(const float* x, uint8_t* codes) {
    const float d = widest_of(x, 256), inverse = inverse_of(d);
    for (int i = 0; i < 256; ++i) {
        const float rounded = std::round(x[i] * inverse);
        codes[i] = std::fabs(rounded) <= 1 ? static_cast<uint8_t>(rounded + 1) : uint8_t{1};
    }
    return d;
}

/// Digits of base 3, the first the highest of five, as a fraction of 256, rounded up.
void put_trits(const uint8_t* codes, int count, int trits, uint8_t* out) {
    for (int i = 0; i < count; ++i) {
        int number = 0;
        for (int n = 0; n < 5; ++n) number = 3 * number + (n < trits ? codes[n * count + i] : 0);
        out[i] = static_cast<uint8_t>((number * 256 + 242) / 243);
    }
}

}  // namespace

void quantize_q4_0(const float* x, const float* importance, int columns, uint8_t* out) {
    small_row<4, false>(x, importance, columns, out);
}

void quantize_q4_1(const float* x, const float* importance, int columns, uint8_t* out) {
    small_row<4, true>(x, importance, columns, out);
}

void quantize_q5_0(const float* x, const float* importance, int columns, uint8_t* out) {
    small_row<5, false>(x, importance, columns, out);
}

void quantize_q5_1(const float* x, const float* importance, int columns, uint8_t* out) {
    small_row<5, true>(x, importance, columns, out);
}

void quantize_q8_0(const float* x, const float*, int columns, uint8_t* out) {
    for (int at = 0; at < columns; at += kSmall, x += kSmall, out += 2 + kSmall) {
        const float d = widest_of(x, kSmall) / 127, inverse = inverse_of(d);
        put_half(out, d);
        for (int i = 0; i < kSmall; ++i) out[2 + i] = integer_part(std::round(x[i] * inverse));
    }
}

void quantize_tq1_0(const float* x, const float*, int columns, uint8_t* out) {
    uint8_t codes[256];
    for (int at = 0; at < columns; at += 256, x += 256, out += 54) {
        put_half(out + 52, round_ternary(x, codes));
        put_trits(codes, 32, 5, out);
        put_trits(codes + 160, 16, 5, out + 32);
        put_trits(codes + 240, 4, 4, out + 48);
    }
}

void quantize_tq2_0(const float* x, const float*, int columns, uint8_t* out) {
    uint8_t codes[256];
    for (int at = 0; at < columns; at += 256, x += 256, out += 66) {
        put_half(out + 64, round_ternary(x, codes));
        for (int half = 0; half < 2; ++half) put_quarters(codes + 128 * half, 32, 0, out + 32 * half);
    }
}

}  // namespace tritkit::ggml

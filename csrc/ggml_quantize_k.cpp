// q2_k to q6_k: a search for each group of a block, then one for the scales (and minima) of the groups, then the codes
// anew at the scales as they are stored.
#include <algorithm>

#include "ggml_quantize.h"
#include "ggml_quantize_bytes.h"
#include "ggml_quantize_search.h"

namespace tritkit::ggml {
namespace {

constexpr int kBlock = 256;

/// What the searches find in a block of groups of N columns.
template <int N>
struct Found {
    static constexpr int kGroups = kBlock / N;
    float scales[kGroups], mins[kGroups];
    float weights[kGroups];  // sums over the groups
    uint8_t codes[kBlock];
};

/// The i-th values of groups that lie one behind the other.
template <int N>
void gather(const float* from, Floats (&to)[N]) {
    for (int i = 0; i < N; ++i)
        for (int k = 0; k < kLanes; ++k) to[i][k] = from[k * N + i];
}

Floats square_root(Floats x) {
    for (int k = 0; k < kLanes; ++k) x[k] = std::sqrt(x[k]);
    return x;
}

float sum_of_squares(const float* x) {
    float sum = 0;
    for (int i = 0; i < kBlock; ++i) sum += x[i] * x[i];
    return sum;
}

template <int N>
void weigh_by_importance(const float* importance, float variance, const Floats (&x)[N], Floats (&w)[N]) {
    gather(importance, w);
    for (int i = 0; i < N; ++i) w[i] *= square_root(x[i] * x[i] + variance);
}

/// search(x, w, codes, min) for each vector of groups; w: of weigh(x, w, first group).
template <int N, class Weigh, class Search>
void search_groups(const float* values, Found<N>& found, Weigh weigh, Search search) {
    for (int g = 0; g < Found<N>::kGroups; g += kLanes) {
        Floats x[N], w[N], codes[N], min = {}, sum = {};
        gather(values + g * N, x);
        weigh(x, w, g);
        for (int i = 0; i < N; ++i) sum += w[i];
        const Floats scale = search(x, w, codes, min);
        for (int k = 0; k < kLanes; ++k) {
            found.scales[g + k] = scale[k];
            found.mins[g + k] = min[k];
            found.weights[g + k] = sum[k];
            for (int i = 0; i < N; ++i) found.codes[(g + k) * N + i] = static_cast<uint8_t>(codes[i][k]);
        }
    }
}

/// The nearest codes from lo to hi, minus lo, at the scales that the bytes of a block say; where a scale is zero, the
/// codes of the search remain.
template <int N>
void round_to_stored(const BlockType& type, const uint8_t* bytes, const float* x, float lo, float hi, uint8_t* codes) {
    Block said;
    type.unpack(bytes, said);
    const float d = float_from_f16(said.d), m = float_from_f16(said.m);
    for (int g = 0; g < kBlock / N; ++g) {
        const float scale = d * static_cast<int8_t>(said.scales[g]);
        if (scale == 0) continue;
        const float min = type.offsets == GroupOffsets::kMins ? m * said.mins[g] : 0.0f;
        for (int i = g * N; i < (g + 1) * N; ++i)
            codes[i] = static_cast<uint8_t>(nearest((x[i] + min) / scale, lo, hi) - lo);
    }
}

/// The integer that a byte keeps of the nearest one.
uint8_t nearest_byte(float x) { return static_cast<uint8_t>(static_cast<int32_t>(nearest(x))); }

/// Scales or minima as integers from 0 to top, and what a one stands for: the largest becomes top.
float levels_by_largest(const float* values, int count, float top, uint8_t* levels) {
    float largest = 0;
    for (int g = 0; g < count; ++g) largest = values[g] > largest ? values[g] : largest;
    const float inverse = largest > 0 ? top / largest : 0.0f;
    for (int g = 0; g < count; ++g) levels[g] = nearest_byte(inverse * values[g]);
    return largest / top;
}

/// q2_k, q4_k, q5_k: a code is 0 to `top`, a level 0 to `top_level`.
struct MinType {
    float top, top_level;
    MinSearch plain;  // without importance; with it the search is finer
    float variances;  // of a block, which are added to the squares of the values under their importance
};

constexpr MinType kQ2 = {3, 15, {3, -0.5f, 0.1f, 15}, 1};
constexpr MinType kQ4 = {15, 63, {15, -1.0f, 0.1f, 20}, 2};
constexpr MinType kQ5 = {31, 63, {31, -0.5f, 0.1f, 15}, 2};

/// Scales, minima and codes of a block, its levels in scales and mins, and d and dmin.
template <bool kAbsolute, int N, class Weigh>
void search_with_mins(const MinType& type, const float* x, const float* importance, Weigh weigh, Found<N>& found,
                      uint8_t* scales, uint8_t* mins, float& d, float& dmin) {
    constexpr int groups = Found<N>::kGroups;
    if (importance) {
        const float variance = type.variances * sum_of_squares(x) / kBlock;
        const MinSearch fine = {type.top, -0.9f, 0.05f, 36};
        search_groups(
            x, found,
            [&](const Floats(&v)[N], Floats(&w)[N], int g) { weigh_by_importance(importance + g * N, variance, v, w); },
            [&](const Floats(&v)[N], const Floats(&w)[N], Floats(&codes)[N], Floats& min) {
                return search_scale_and_min<false>(v, w, fine, min, codes);
            });
        d = search_positive(found.scales, found.weights, groups, type.top_level, scales);
        dmin = search_positive(found.mins, found.weights, groups, type.top_level, mins);
    } else {
        search_groups(x, found, weigh, [&](const Floats(&v)[N], const Floats(&w)[N], Floats(&codes)[N], Floats& min) {
            return search_scale_and_min<kAbsolute>(v, w, type.plain, min, codes);
        });
        d = levels_by_largest(found.scales, groups, type.top_level, scales);
        dmin = levels_by_largest(found.mins, groups, type.top_level, mins);
    }
}

/// Large values count more: |x| is added to the root of their mean square.
void weigh_by_size(const Floats (&x)[32], Floats (&w)[32], int) {
    Floats sum = {};
    for (int i = 0; i < 32; ++i) sum += x[i] * x[i];
    const Floats root = square_root(sum / 32.0f);
    for (int i = 0; i < 32; ++i) w[i] = root + size_of(x[i]);
}

/// q4_k and q5_k but for their codes: d, dmin and 6 bits of each level. at_most_63: whether larger levels, of scales
/// that are below zero by a rounding error, are cut off; ggml does it in all cases but one.
void q45_block(const BlockType& type, const MinType& numbers, bool at_most_63, const float* x, const float* importance,
               uint8_t* out, uint8_t* codes) {
    Found<32> found;
    uint8_t scales[8], mins[8];
    float d, dmin;
    search_with_mins<false>(numbers, x, importance, weigh_by_size, found, scales, mins, d, dmin);
    for (int g = 0; g < 8 && at_most_63; ++g) {
        scales[g] = std::min<uint8_t>(scales[g], 63);
        mins[g] = std::min<uint8_t>(mins[g], 63);
    }
    put_half(out, d);
    put_half(out + 2, dmin);
    put_six_bits(scales, mins, out + 4);
    std::copy(found.codes, found.codes + kBlock, codes);
    round_to_stored<32>(type, out, x, 0, numbers.top, codes);
}

void weigh_by_squares(const Floats (&x)[16], Floats (&w)[16], int) {
    for (int i = 0; i < 16; ++i) w[i] = x[i] * x[i];
}

/// 16 scales of 6 bits, 32 standing for zero.
void put_q3_scales(const uint8_t* levels, uint8_t* out) {
    for (int i = 0; i < 8; ++i) out[i] = static_cast<uint8_t>((levels[i] & 15) | (levels[i + 8] & 15) << 4);
    put_quarters(levels, 4, 4, out + 8);
}

/// The scale of largest size, the first of them.
float largest_scale(const float* scales) {
    float largest = 0;
    for (int g = 0; g < 16; ++g) largest = std::fabs(scales[g]) > std::fabs(largest) ? scales[g] : largest;
    return largest;
}

}  // namespace

void quantize_q2_k(const float* x, const float* importance, int columns, uint8_t* out) {
    static const BlockType& type = *find_block_type("q2_k");
    for (int at = 0; at < columns; at += kBlock, x += kBlock, out += type.bytes) {
        Found<16> found;
        uint8_t scales[16], mins[16];
        float d, dmin;
        const auto by_size = [](const Floats(&v)[16], Floats(&w)[16], int) {
            for (int i = 0; i < 16; ++i) w[i] = size_of(v[i]);
        };
        search_with_mins<true>(kQ2, x, importance ? importance + at : nullptr, by_size, found, scales, mins, d, dmin);
        for (int g = 0; g < 16; ++g) out[g] = static_cast<uint8_t>(scales[g] | mins[g] << 4);
        put_half(out + 80, d);
        put_half(out + 82, dmin);
        round_to_stored<16>(type, out, x, 0, kQ2.top, found.codes);
        for (int half = 0; half < 2; ++half) put_quarters(found.codes + 128 * half, 32, 0, out + 16 + 32 * half);
    }
}

void quantize_q3_k(const float* x, const float* importance, int columns, uint8_t* out) {
    static const BlockType& type = *find_block_type("q3_k");
    for (int at = 0; at < columns; at += kBlock, x += kBlock, out += type.bytes) {
        Found<16> found;
        uint8_t levels[16];
        float d;
        if (importance) {
            const float variance = 2 * sum_of_squares(x) / kBlock;
            search_groups(
                x, found,
                [&](const Floats(&v)[16], Floats(&w)[16], int g) {
                    weigh_by_importance(importance + at + g * 16, variance, v, w);
                },
                [](const Floats(&v)[16], const Floats(&w)[16], Floats(&codes)[16], Floats&) {
                    return search_scale(v, w, 4, codes);
                });
            float codes[16];
            d = search_scale(found.scales, found.weights, 32, codes);
            for (int g = 0; g < 16; ++g) levels[g] = static_cast<uint8_t>(codes[g]);
        } else {
            search_groups(x, found, weigh_by_squares,
                          [](const Floats(&v)[16], const Floats(&)[16], Floats(&codes)[16], Floats&) {
                              return search_scale_by_codes(v, 4, codes);
                          });
            const float largest = largest_scale(found.scales), inverse = -32 / largest;
            for (int g = 0; g < 16; ++g)
                levels[g] = largest == 0 ? 0 : static_cast<uint8_t>(nearest(inverse * found.scales[g], -32, 31) + 32);
            d = largest == 0 ? 0 : 1 / inverse;
        }
        put_q3_scales(levels, out + 96);
        put_half(out + 108, d);
        round_to_stored<16>(type, out, x, -4, 3, found.codes);
        put_bits(found.codes, 32, 2, out);
        for (int half = 0; half < 2; ++half) put_quarters(found.codes + 128 * half, 32, 0, out + 32 + 32 * half);
    }
}

void quantize_q4_k(const float* x, const float* importance, int columns, uint8_t* out) {
    static const BlockType& type = *find_block_type("q4_k");
    uint8_t codes[kBlock];
    for (int at = 0; at < columns; at += kBlock, x += kBlock, out += type.bytes) {
        q45_block(type, kQ4, !importance, x, importance ? importance + at : nullptr, out, codes);
        for (int c = 0; c < 4; ++c) put_nibbles(codes + 64 * c, 32, out + 16 + 32 * c);
    }
}

void quantize_q5_k(const float* x, const float* importance, int columns, uint8_t* out) {
    static const BlockType& type = *find_block_type("q5_k");
    uint8_t codes[kBlock];
    for (int at = 0; at < columns; at += kBlock, x += kBlock, out += type.bytes) {
        q45_block(type, kQ5, true, x, importance ? importance + at : nullptr, out, codes);
        put_bits(codes, 32, 4, out + 16);
        for (int c = 0; c < 4; ++c) put_nibbles(codes + 64 * c, 32, out + 48 + 32 * c);
    }
}

void quantize_q6_k(const float* x, const float* importance, int columns, uint8_t* out) {
    static const BlockType& type = *find_block_type("q6_k");
    for (int at = 0; at < columns; at += kBlock, x += kBlock, out += type.bytes) {
        Found<16> found;
        const auto weigh = [&](const Floats(&v)[16], Floats(&w)[16], int g) {
            if (importance)
                gather(importance + at + g * 16, w);
            else
                weigh_by_squares(v, w, g);
        };
        search_groups(x, found, weigh, [](const Floats(&v)[16], const Floats(&w)[16], Floats(&codes)[16], Floats&) {
            return search_scale(v, w, 32, codes);
        });
        const float largest = largest_scale(found.scales);
        if (std::fabs(largest) < kNothing) {
            std::fill(out, out + type.bytes, uint8_t{0});
            continue;
        }
        const float inverse = -128 / largest;
        for (int g = 0; g < 16; ++g) out[192 + g] = nearest_byte(std::min(nearest(inverse * found.scales[g]), 127.0f));
        put_half(out + 208, 1 / inverse);
        round_to_stored<16>(type, out, x, -32, 31, found.codes);
        for (int half = 0; half < 2; ++half) {
            put_nibbles(found.codes + 128 * half, 64, out + 64 * half);
            put_quarters(found.codes + 128 * half, 32, 4, out + 128 + 32 * half);
        }
    }
}

}  // namespace tritkit::ggml

// 512-bit kernels. vpdpbusd (AVX512-VNNI) multiplies 64 unsigned bytes (codes) with 64 signed bytes (activations) and
// adds groups of four to 16 int32 sums: with T16 tiles that is 16 rows at once, and it does not saturate.
#if defined(__x86_64__)

#if !defined(__clang__)
// gcc 12 calls the deliberately undefined operands inside its own intrinsics uninitialized.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstring>

#include "isa_region.h"
#include "kernels.h"

namespace tritkit {
namespace {

bool supported() {
    __builtin_cpu_init();  // also asks the operating system whether it saves the registers (xgetbv)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

constexpr int kAhead = 2048;  // bytes from the load to the prefetch, in each of the streams

ISA_BEGIN("avx512f,avx512bw,avx512vl,avx512vnni")

// As assembly, since gcc 12 copies and spills around the tied operand of _mm512_dpbusd_epi32.
TRITKIT_INLINE __m512i dot(__m512i sum, __m512i codes, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
    return sum;
}

/// Four activation codes, copied to all rows.
TRITKIT_INLINE __m512i broadcast4(const int8_t* x) {
    int32_t four;
    memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
}

TRITKIT_INLINE const uint8_t* tile_at(const TileProduct& p, int tile) {
    return p.weights + static_cast<ptrdiff_t>(tile) * p.blocks * kBlockBytes;
}

/// The stored codes are w + 1 (ternary) or (w + 1) / 2 (binary).
template <int bits>
TRITKIT_INLINE void store_tile(const TileProduct& p, int tile, int token, __m512i sum) {
    if (bits == 1) sum = _mm512_slli_epi32(sum, 1);
    sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(p.sums[token]));
    _mm512_storeu_si512(p.out + token * p.out_stride + (tile - p.tile_begin) * kTileRows, sum);
}

/// One token: the codes stay where they are in their bytes, so each field has a sum of its own, too large by
/// 2^(bits * field), and is shifted only at the end. Two instructions for 64 weights.
template <int bits, int tiles>
void one_token(const TileProduct& p, int tile, int distance, int token) {
    constexpr int fields = 8 / bits;
    const int8_t* x = p.codes + token * p.code_stride;
    const uint8_t* w[tiles];
    __m512i sums[tiles][fields], masks[fields];
    for (int f = 0; f < fields; ++f) masks[f] = _mm512_set1_epi8(static_cast<char>(((1 << bits) - 1) << (bits * f)));
    for (int s = 0; s < tiles; ++s) {
        w[s] = tile_at(p, tile + s * distance);
        for (int f = 0; f < fields; ++f) sums[s][f] = _mm512_setzero_si512();
    }
    for (int b = 0; b < p.blocks; ++b, x += 4 * fields) {
        __m512i v[tiles];
#pragma GCC unroll 4
        for (int s = 0; s < tiles; ++s) {
            _mm_prefetch(reinterpret_cast<const char*>(w[s] + kAhead), _MM_HINT_T0);
            v[s] = _mm512_loadu_si512(w[s]);
            w[s] += kBlockBytes;
        }
#pragma GCC unroll 8
        for (int f = 0; f < fields; ++f) {
            const __m512i four = broadcast4(x + 4 * f);
#pragma GCC unroll 4
            for (int s = 0; s < tiles; ++s) sums[s][f] = dot(sums[s][f], _mm512_and_si512(v[s], masks[f]), four);
        }
    }
    for (int s = 0; s < tiles; ++s) {
        __m512i sum = sums[s][0];
#pragma GCC unroll 8
        for (int f = 1; f < fields; ++f) sum = _mm512_add_epi32(sum, _mm512_srai_epi32(sums[s][f], bits * f));
        store_tile<bits>(p, tile + s * distance, token, sum);
    }
}

/// Several tokens: each field is shifted down once and used for all of them.
template <int bits, int tokens, int tiles>
void some_tokens(const TileProduct& p, int tile, int distance, int token) {
    constexpr int fields = 8 / bits;
    const __m512i mask = _mm512_set1_epi8((1 << bits) - 1);
    const int8_t* x = p.codes + token * p.code_stride;
    const uint8_t* w[tiles];
    __m512i sums[tokens][tiles];
    for (int s = 0; s < tiles; ++s) {
        w[s] = tile_at(p, tile + s * distance);
        for (int t = 0; t < tokens; ++t) sums[t][s] = _mm512_setzero_si512();
    }
    for (int b = 0; b < p.blocks; ++b, x += 4 * fields) {
        __m512i v[tiles];
#pragma GCC unroll 4
        for (int s = 0; s < tiles; ++s) {
            _mm_prefetch(reinterpret_cast<const char*>(w[s] + kAhead), _MM_HINT_T0);
            v[s] = _mm512_loadu_si512(w[s]);
            w[s] += kBlockBytes;
        }
#pragma GCC unroll 8
        for (int f = 0; f < fields; ++f) {
            __m512i codes[tiles];
#pragma GCC unroll 4
            for (int s = 0; s < tiles; ++s) {
                codes[s] = _mm512_and_si512(v[s], mask);
                v[s] = _mm512_srli_epi32(v[s], bits);
            }
#pragma GCC unroll 8
            for (int t = 0; t < tokens; ++t) {
                const __m512i four = broadcast4(x + t * p.code_stride + 4 * f);
#pragma GCC unroll 4
                for (int s = 0; s < tiles; ++s) sums[t][s] = dot(sums[t][s], codes[s], four);
            }
        }
    }
    for (int t = 0; t < tokens; ++t)
        for (int s = 0; s < tiles; ++s) store_tile<bits>(p, tile + s * distance, token + t, sums[t][s]);
}

/// All tokens with one tile, or with four: tile, tile + distance ... Four long streams use the memory best.
template <int bits>
void all_tokens(const TileProduct& p, int tile, int distance) {
    int t = 0;
    if (distance == 0) {
        for (; t + 8 <= p.tokens; t += 8) some_tokens<bits, 8, 1>(p, tile, 0, t);
        for (; t < p.tokens; ++t) one_token<bits, 1>(p, tile, 0, t);
        return;
    }
    for (; t + 8 <= p.tokens; t += 8) {
        some_tokens<bits, 8, 2>(p, tile, distance, t);
        some_tokens<bits, 8, 2>(p, tile + 2 * distance, distance, t);
    }
    if (t + 4 <= p.tokens) some_tokens<bits, 4, 4>(p, tile, distance, t), t += 4;
    if (t + 2 <= p.tokens) some_tokens<bits, 2, 4>(p, tile, distance, t), t += 2;
    if (t < p.tokens) {
        constexpr int tiles = 2 * bits;  // 16 sums fill half of the registers
        for (int s = 0; s < 4; s += tiles) one_token<bits, tiles>(p, tile + s * distance, distance, t);
    }
}

template <int bits>
void matmul_tiles(const TileProduct& p) {
    const int quarter = (p.tile_end - p.tile_begin) / 4;
    for (int i = 0; i < quarter; ++i) all_tokens<bits>(p, p.tile_begin + i, quarter);
    for (int tile = p.tile_begin + 4 * quarter; tile < p.tile_end; ++tile) all_tokens<bits>(p, tile, 0);
}

void matmul_ternary(const TileProduct& p) { matmul_tiles<2>(p); }
void matmul_binary(const TileProduct& p) { matmul_tiles<1>(p); }

TRITKIT_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1 << n) - 1); }

float quantize_row(const float* x, int columns, float levels, int8_t* codes, int32_t* sum) {
    // max and min return their second operand if one is not a number, as the comparisons of the scalar code do.
    __m512 absmax16 = _mm512_setzero_ps();
    for (int i = 0; i < columns; i += 16) {
        const __m512 v = _mm512_maskz_loadu_ps(first_lanes(columns - i), x + i);
        absmax16 = _mm512_max_ps(_mm512_abs_ps(v), absmax16);
    }
    const float absmax = _mm512_reduce_max_ps(absmax16);
    const float inverse = levels / (absmax > 1e-5f ? absmax : 1e-5f);
    const __m512 factor = _mm512_set1_ps(inverse), low = _mm512_set1_ps(-128.0f), high = _mm512_set1_ps(127.0f);
    __m512i total = _mm512_setzero_si512();
    for (int i = 0; i < columns; i += 16) {
        const __mmask16 lanes = first_lanes(columns - i);
        __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + i), factor);
        v = _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m512i code = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(v, low), high));
        total = _mm512_mask_add_epi32(total, lanes, total, code);
        _mm512_mask_cvtepi32_storeu_epi8(codes + i, lanes, code);
    }
    *sum = _mm512_reduce_add_epi32(total);
    return 1.0f / inverse;
}

struct F32 {
    using Element = float;
    TRITKIT_INLINE __m512 load16(const float* w) { return _mm512_loadu_ps(w); }
};
struct F16 {
    using Element = uint16_t;
    TRITKIT_INLINE __m512 load16(const uint16_t* w) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
    }
};
struct BF16 {
    using Element = uint16_t;
    TRITKIT_INLINE __m512 load16(const uint16_t* w) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
};

/// Rows row, row + distance ... with some tokens. Every sum is one chain along the columns, whatever its neighbours.
template <class Format, int rows, int tokens>
void float_block(const FloatProduct& p, int row, int distance, int token) {
    const auto* w = static_cast<const typename Format::Element*>(p.weights) + row * p.row_stride;
    const ptrdiff_t stride = distance * p.row_stride;
    const float* x = p.x + token * p.x_stride;
    __m512 sums[rows][tokens];
    for (int r = 0; r < rows; ++r)
        for (int t = 0; t < tokens; ++t) sums[r][t] = _mm512_setzero_ps();
    for (int k = 0; k < p.columns; k += 16) {
        __m512 v[rows];
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
            const auto* at = w + r * stride + k;
            if (tokens == 1) _mm_prefetch(reinterpret_cast<const char*>(at) + kAhead, _MM_HINT_T0);
            v[r] = Format::load16(at);
        }
#pragma GCC unroll 4
        for (int t = 0; t < tokens; ++t) {
            const __m512 xt = _mm512_loadu_ps(x + t * p.x_stride + k);
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) sums[r][t] = _mm512_fmadd_ps(v[r], xt, sums[r][t]);
        }
    }
    for (int r = 0; r < rows; ++r)
        for (int t = 0; t < tokens; ++t)
            p.out[(token + t) * p.out_stride + (row + r * distance - p.row_begin)] = _mm512_reduce_add_ps(sums[r][t]);
}

template <class Format, int rows>
void float_rows(const FloatProduct& p, int row, int distance, int token, int tokens) {
    if (tokens >= 4)
        float_block<Format, rows, 4>(p, row, distance, token);
    else if (tokens == 3)
        float_block<Format, rows, 3>(p, row, distance, token);
    else if (tokens == 2)
        float_block<Format, rows, 2>(p, row, distance, token);
    else
        float_block<Format, rows, 1>(p, row, distance, token);
}

template <class Format>
void matmul_floats(const FloatProduct& p) {
    constexpr int panel = 64;  // with many tokens, so many rows stay in cache
    const int n = p.row_end - p.row_begin, step = p.tokens <= 4 ? (n > 0 ? n : 1) : panel;
    for (int begin = p.row_begin; begin < p.row_end; begin += step) {
        const int end = begin + step < p.row_end ? begin + step : p.row_end, quarter = (end - begin) / 4;
        for (int t = 0; t < p.tokens; t += 4) {
            for (int i = 0; i < quarter; ++i) float_rows<Format, 4>(p, begin + i, quarter, t, p.tokens - t);
            for (int r = begin + 4 * quarter; r < end; ++r) float_rows<Format, 1>(p, r, 0, t, p.tokens - t);
        }
    }
}

ISA_END

}  // namespace

extern const VectorKernels kAvx512Vectors;
extern const Kernels kAvx512;
const Kernels kAvx512 = {
    "avx512",           supported,          quantize_row,        matmul_ternary,  matmul_binary,
    matmul_floats<F32>, matmul_floats<F16>, matmul_floats<BF16>, &kAvx512Vectors,
};

}  // namespace tritkit

#endif

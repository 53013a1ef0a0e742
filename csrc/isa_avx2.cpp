// 256-bit kernels. vpmaddubsw multiplies 32 unsigned bytes (codes) with 32 signed bytes (activations) and adds pairs
// to 16 int16 sums, which must be widened before they can overflow.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "isa_region.h"
#include "kernels.h"

namespace tritkit {
namespace {

bool supported() {
    __builtin_cpu_init();  // also asks the operating system whether it saves the registers (xgetbv)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

constexpr int kAhead = 2048;  // bytes from the load to the prefetch, in each of the streams

// One block adds at most 4 fields * 2 products * 2 * 128 (ternary) or 8 * 2 * 1 * 128 (binary) = 2048 to an int16 sum:
// 16 blocks stay within [-32768, 32512].
constexpr int kBlocksPerWidening = 16;

ISA_BEGIN("avx2,fma,f16c")

/// Four activation codes, copied to all rows.
TRITKIT_INLINE __m256i broadcast4(const int8_t* x) {
    int32_t four;
    memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}

/// A vector is half a tile, 8 rows. Vectors 2s and 2s + 1 are the halves of tile + s * distance; a single vector is
/// the half `first`. vectors * tokens = 4: as many sums as fit into 16 registers.
template <int bits, int vectors, int tokens>
void some_tokens(const TileProduct& p, int tile, int distance, int first, int token) {
    constexpr int fields = 8 / bits;
    const __m256i mask = _mm256_set1_epi8((1 << bits) - 1), ones = _mm256_set1_epi16(1);
    const int8_t* x = p.codes + token * p.code_stride;
    const ptrdiff_t tile_stride = static_cast<ptrdiff_t>(p.blocks) * kBlockBytes;
    const uint8_t* w[vectors];
    __m256i sums[vectors][tokens];
    for (int s = 0; s < vectors; ++s) {
        w[s] = p.weights + (tile + s / 2 * distance) * tile_stride + (first + s % 2) * (kBlockBytes / 2);
        for (int t = 0; t < tokens; ++t) sums[s][t] = _mm256_setzero_si256();
    }
    for (int begin = 0; begin < p.blocks; begin += kBlocksPerWidening) {
        const int end = begin + kBlocksPerWidening < p.blocks ? begin + kBlocksPerWidening : p.blocks;
        __m256i narrow[vectors][tokens];
        for (int s = 0; s < vectors; ++s)
            for (int t = 0; t < tokens; ++t) narrow[s][t] = _mm256_setzero_si256();
        for (int b = begin; b < end; ++b, x += 4 * fields) {
            __m256i v[vectors];
#pragma GCC unroll 4
            for (int s = 0; s < vectors; ++s) {
                if (s % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(w[s] + kAhead), _MM_HINT_T0);
                v[s] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w[s]));
                w[s] += kBlockBytes;
            }
#pragma GCC unroll 8
            for (int f = 0; f < fields; ++f) {
                __m256i codes[vectors];
#pragma GCC unroll 4
                for (int s = 0; s < vectors; ++s) {
                    codes[s] = _mm256_and_si256(v[s], mask);
                    v[s] = _mm256_srli_epi16(v[s], bits);
                }
#pragma GCC unroll 4
                for (int t = 0; t < tokens; ++t) {
                    const __m256i four = broadcast4(x + t * p.code_stride + 4 * f);
#pragma GCC unroll 4
                    for (int s = 0; s < vectors; ++s)
                        narrow[s][t] = _mm256_add_epi16(narrow[s][t], _mm256_maddubs_epi16(codes[s], four));
                }
            }
        }
        for (int s = 0; s < vectors; ++s)
            for (int t = 0; t < tokens; ++t)
                sums[s][t] = _mm256_add_epi32(sums[s][t], _mm256_madd_epi16(narrow[s][t], ones));
    }
    for (int s = 0; s < vectors; ++s) {
        const int row = (tile + s / 2 * distance - p.tile_begin) * kTileRows + (first + s % 2) * 8;
        for (int t = 0; t < tokens; ++t) {
            // The stored codes are w + 1 (ternary) or (w + 1) / 2 (binary).
            __m256i sum = bits == 1 ? _mm256_slli_epi32(sums[s][t], 1) : sums[s][t];
            sum = _mm256_sub_epi32(sum, _mm256_set1_epi32(p.sums[token + t]));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(p.out + (token + t) * p.out_stride + row), sum);
        }
    }
}

/// All tokens with one tile (distance 0), or with two: tile and tile + distance.
template <int bits>
void all_tokens(const TileProduct& p, int tile, int distance) {
    const int tiles = distance ? 2 : 1;
    int t = 0;
    for (; t + 4 <= p.tokens; t += 4)
        for (int half = 0; half < 2 * tiles; ++half)
            some_tokens<bits, 1, 4>(p, tile + half / 2 * distance, 0, half % 2, t);
    for (; t + 2 <= p.tokens; t += 2)
        for (int s = 0; s < tiles; ++s) some_tokens<bits, 2, 2>(p, tile + s * distance, 0, 0, t);
    if (t < p.tokens && distance) some_tokens<bits, 4, 1>(p, tile, distance, 0, t);
    if (t < p.tokens && !distance) some_tokens<bits, 2, 1>(p, tile, 0, 0, t);
}

template <int bits>
void matmul_tiles(const TileProduct& p) {
    const int half = (p.tile_end - p.tile_begin) / 2;
    for (int i = 0; i < half; ++i) all_tokens<bits>(p, p.tile_begin + i, half);
    if (p.tile_begin + 2 * half < p.tile_end) all_tokens<bits>(p, p.tile_begin + 2 * half, 0);
}

void matmul_ternary(const TileProduct& p) { matmul_tiles<2>(p); }
void matmul_binary(const TileProduct& p) { matmul_tiles<1>(p); }

TRITKIT_INLINE float sum8(__m256 v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

/// Eight floats, zeros beyond the end of the row.
TRITKIT_INLINE __m256 load_up_to_8(const float* x, int left) {
    if (left >= 8) return _mm256_loadu_ps(x);
    float padded[8] = {};
    memcpy(padded, x, static_cast<size_t>(left) * sizeof(float));
    return _mm256_loadu_ps(padded);
}

float quantize_row(const float* x, int columns, float levels, int8_t* codes, int32_t* sum) {
    // max and min return their second operand if one is not a number, as the comparisons of the scalar code do.
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 absmax8 = _mm256_setzero_ps();
    for (int i = 0; i < columns; i += 8)
        absmax8 = _mm256_max_ps(_mm256_andnot_ps(sign, load_up_to_8(x + i, columns - i)), absmax8);
    float lanes[8], absmax = 0.0f;
    _mm256_storeu_ps(lanes, absmax8);
    for (float lane : lanes) absmax = lane > absmax ? lane : absmax;
    const float inverse = levels / (absmax > 1e-5f ? absmax : 1e-5f);
    const __m256 factor = _mm256_set1_ps(inverse), low = _mm256_set1_ps(-128.0f), high = _mm256_set1_ps(127.0f);
    int32_t total = 0;
    for (int i = 0; i < columns; i += 8) {
        __m256 v = _mm256_mul_ps(load_up_to_8(x + i, columns - i), factor);
        v = _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        alignas(32) int32_t wide[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(wide),
                           _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(v, low), high)));
        for (int j = 0; j < 8 && i + j < columns; ++j) {
            codes[i + j] = static_cast<int8_t>(wide[j]);
            total += wide[j];
        }
    }
    *sum = total;
    return 1.0f / inverse;
}

struct F32 {
    using Element = float;
    TRITKIT_INLINE __m256 load8(const float* w) { return _mm256_loadu_ps(w); }
};
struct F16 {
    using Element = uint16_t;
    TRITKIT_INLINE __m256 load8(const uint16_t* w) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
    }
};
struct BF16 {
    using Element = uint16_t;
    TRITKIT_INLINE __m256 load8(const uint16_t* w) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
};

/// Rows row, row + distance ... with some tokens. Every sum is one chain along the columns, whatever its neighbours.
template <class Format, int rows, int tokens>
void float_block(const FloatProduct& p, int row, int distance, int token) {
    const auto* w = static_cast<const typename Format::Element*>(p.weights) + row * p.row_stride;
    const ptrdiff_t stride = distance * p.row_stride;
    const float* x = p.x + token * p.x_stride;
    __m256 sums[rows][tokens];
    for (int r = 0; r < rows; ++r)
        for (int t = 0; t < tokens; ++t) sums[r][t] = _mm256_setzero_ps();
    for (int k = 0; k < p.columns; k += 8) {
        __m256 v[rows];
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
            const auto* at = w + r * stride + k;
            if (tokens == 1) _mm_prefetch(reinterpret_cast<const char*>(at) + kAhead, _MM_HINT_T0);
            v[r] = Format::load8(at);
        }
#pragma GCC unroll 2
        for (int t = 0; t < tokens; ++t) {
            const __m256 xt = _mm256_loadu_ps(x + t * p.x_stride + k);
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) sums[r][t] = _mm256_fmadd_ps(v[r], xt, sums[r][t]);
        }
    }
    for (int r = 0; r < rows; ++r)
        for (int t = 0; t < tokens; ++t)
            p.out[(token + t) * p.out_stride + (row + r * distance - p.row_begin)] = sum8(sums[r][t]);
}

template <class Format>
void matmul_floats(const FloatProduct& p) {
    constexpr int panel = 64;  // with many tokens, so many rows stay in cache
    const int n = p.row_end - p.row_begin, step = p.tokens <= 2 ? (n > 0 ? n : 1) : panel;
    for (int begin = p.row_begin; begin < p.row_end; begin += step) {
        const int end = begin + step < p.row_end ? begin + step : p.row_end, quarter = (end - begin) / 4;
        for (int t = 0; t < p.tokens; t += 2) {
            const bool two = t + 2 <= p.tokens;
            for (int i = 0; i < quarter; ++i)
                two ? float_block<Format, 4, 2>(p, begin + i, quarter, t)
                    : float_block<Format, 4, 1>(p, begin + i, quarter, t);
            for (int r = begin + 4 * quarter; r < end; ++r)
                two ? float_block<Format, 1, 2>(p, r, 0, t) : float_block<Format, 1, 1>(p, r, 0, t);
        }
    }
}

ISA_END

}  // namespace

extern const VectorKernels kAvx2Vectors;
extern const Kernels kAvx2;
const Kernels kAvx2 = {
    "avx2",        supported,          quantize_row,       matmul_ternary,
    matmul_binary, matmul_floats<F32>, matmul_floats<F16>, matmul_floats<BF16>,
    &kAvx2Vectors,
};

}  // namespace tritkit

#endif

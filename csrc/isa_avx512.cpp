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

alignas(64) constexpr int32_t kCount[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

ISA_BEGIN("avx512f,avx512bw,avx512vl,avx512vnni")

/// A block of a tile in one register; tile_kernels.h says what each of these is for.
struct V {
    using Bytes = __m512i;
    using Ints = __m512i;
    static constexpr int kBytes = 64, kStreams = 4, kFewTokens = 4, kFewTiles = 4, kGroupTokens = 8, kGroupTiles = 2,
                         kPanelTokens = 6, kPanelTiles = 4, kRowTokens = 8,
                         kPanelFrom = 1 << 30;  // never: taking the codes out for every 8 tokens costs nothing visible
    static constexpr bool kUnsignedDot = true, kByteShifts = false;
    template <int largest>
    static constexpr bool narrow() {
        return false;
    }
    template <int bits>
    static constexpr int places() {
        return bits == 1 ? 4 : 8 / bits;
    }

    TRITKIT_INLINE __m512i load(const uint8_t* p) { return _mm512_loadu_si512(p); }
    TRITKIT_INLINE void store_bytes(uint8_t* p, __m512i v) { _mm512_storeu_si512(p, v); }
    TRITKIT_INLINE __m512i splat(uint8_t byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }
    TRITKIT_INLINE __m512i both(__m512i a, __m512i b) { return _mm512_and_si512(a, b); }
    TRITKIT_INLINE __m512i add(__m512i a, __m512i b) { return _mm512_add_epi8(a, b); }
    template <int n>
    TRITKIT_INLINE __m512i shift_right(__m512i v) {
        return _mm512_srli_epi32(v, n);
    }
    TRITKIT_INLINE __m512i trit(__m512i q) {  // 3 q >= 256, 3 q >= 512
        const __m512i one = splat(1);
        const __m512i t = _mm512_maskz_mov_epi8(_mm512_cmpge_epu8_mask(q, splat(86)), one);
        return _mm512_mask_add_epi8(t, _mm512_cmpge_epu8_mask(q, splat(171)), t, one);
    }
    TRITKIT_INLINE __m512i broadcast4(const int8_t* x, int field) {
        int32_t four;
        memcpy(&four, x + 4 * field, 4);
        return _mm512_set1_epi32(four);
    }
    // As assembly, since gcc 12 copies and spills around the tied operand of _mm512_dpbusd_epi32.
    template <int largest>
    TRITKIT_INLINE __m512i dot(__m512i sum, __m512i codes, __m512i x) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
        return sum;
    }

    template <int largest>
    TRITKIT_INLINE __m512i start(int32_t) {
        return _mm512_setzero_si512();
    }
    TRITKIT_INLINE __m512i splat32(int32_t value) { return _mm512_set1_epi32(value); }
    TRITKIT_INLINE __m512i plus(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
    TRITKIT_INLINE __m512i minus(__m512i a, __m512i b) { return _mm512_sub_epi32(a, b); }
    TRITKIT_INLINE __m512i shift_left(__m512i v, int n) { return _mm512_sll_epi32(v, _mm_cvtsi32_si128(n)); }
    TRITKIT_INLINE __m512i shift_right32(__m512i v, int n) { return _mm512_sra_epi32(v, _mm_cvtsi32_si128(n)); }
    TRITKIT_INLINE __m512i load32(const int32_t* p) { return _mm512_loadu_si512(p); }
    TRITKIT_INLINE void store(int32_t* p, __m512i v) { _mm512_storeu_si512(p, v); }

    // --- For lines: line_kernels.h.
    /// The sum of all elements of each of four vectors.
    TRITKIT_INLINE void sum4(const __m512i (&v)[4], int32_t* out) {
        const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
        const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
        const __m512i lanes = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
        const __m256i two = _mm256_add_epi32(_mm512_castsi512_si256(lanes), _mm512_extracti64x4_epi64(lanes, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                         _mm_add_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1)));
    }
    /// Bytes of four vectors in turn, within 128-bit lanes: the low or the high half of each lane.
    template <bool high>
    TRITKIT_INLINE void interleave(const __m512i (&v)[4], __m512i& first, __m512i& second) {
        const __m512i a = high ? _mm512_unpackhi_epi8(v[0], v[1]) : _mm512_unpacklo_epi8(v[0], v[1]);
        const __m512i b = high ? _mm512_unpackhi_epi8(v[2], v[3]) : _mm512_unpacklo_epi8(v[2], v[3]);
        first = _mm512_unpacklo_epi16(a, b);
        second = _mm512_unpackhi_epi16(a, b);
    }

    // --- For grouped weights: group_kernels.h says what each of these is for.
    using Floats = __m512;
    static constexpr int kSpanStreams = 4, kSpanTokens = 6, kSpanTiles = 2;
    template <int n>
    TRITKIT_INLINE __m512i shift_left(__m512i v) {
        return _mm512_slli_epi32(v, n);
    }
    TRITKIT_INLINE __m512i merge(__m512i a, __m512i b, __m512i mask) {
        return _mm512_ternarylogic_epi32(a, b, mask, 0xf8);  // a | (b & mask)
    }
    TRITKIT_INLINE __m512i load_table(const uint8_t* p) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    TRITKIT_INLINE __m512i lookup(__m512i table, __m512i codes) { return _mm512_shuffle_epi8(table, codes); }
    TRITKIT_INLINE __m512 no_floats() { return _mm512_setzero_ps(); }
    TRITKIT_INLINE __m512 load_floats(const float* p) { return _mm512_loadu_ps(p); }
    TRITKIT_INLINE void store_floats(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
    TRITKIT_INLINE __m512 splat_floats(float value) { return _mm512_set1_ps(value); }
    TRITKIT_INLINE __m512 to_floats(__m512i v) { return _mm512_cvtepi32_ps(v); }
    TRITKIT_INLINE __m512 halves(const uint8_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    TRITKIT_INLINE __m512 int8s(const uint8_t* p) {
        return to_floats(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    TRITKIT_INLINE __m512 uint8s(const uint8_t* p) {
        return to_floats(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    TRITKIT_INLINE __m512 nibbles(const uint8_t* p, int shift) {
        const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return to_floats(_mm512_and_si512(shift_right32(bytes, shift), _mm512_set1_epi32(15)));
    }
    TRITKIT_INLINE __m512 times(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
    TRITKIT_INLINE __m512 subtract(__m512 a, __m512 b) { return _mm512_sub_ps(a, b); }
    TRITKIT_INLINE __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
};

#include "tile_kernels.h"

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

/// Each 32 columns as quantize_row does with a row.
void quantize_groups(const float* x, int columns, ActivationStrip* strips) {
    const __m512 low = _mm512_set1_ps(-127.0f), high = _mm512_set1_ps(127.0f);
    for (; columns > 0; columns -= kStripColumns, x += kStripColumns, ++strips) {
        const __mmask32 lanes = columns >= 32 ? 0xffffffffu : (1u << columns) - 1;
        const __m512 v[2] = {_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), x),
                             _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes >> 16), x + 16)};
        const __m512 absmax16 =
            _mm512_max_ps(_mm512_abs_ps(v[1]), _mm512_max_ps(_mm512_abs_ps(v[0]), _mm512_setzero_ps()));
        const float absmax = _mm512_reduce_max_ps(absmax16), inverse = 127.0f / (absmax > 1e-5f ? absmax : 1e-5f);
        strips->scale = 1.0f / inverse;
        for (int h = 0; h < 2; ++h) {
            __m512 code = _mm512_mul_ps(v[h], _mm512_set1_ps(inverse));
            code = _mm512_roundscale_ps(code, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            __m512i whole = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(code, low), high));
            whole = _mm512_maskz_mov_epi32(static_cast<__mmask16>(lanes >> 16 * h), whole);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(strips->codes + 16 * h), _mm512_cvtepi32_epi8(whole));
            strips->starts[h] = -_mm512_reduce_add_epi32(whole);
        }
        strips->starts[2] = strips->starts[0] + strips->starts[1];
        strips->starts[3] = 0;
        for (int i = 0; i < 3; ++i) strips->moments[i] = strips->scale * static_cast<float>(-strips->starts[i]);
    }
}

#include "group_kernels.h"
#include "line_kernels.h"

int list_above(const float* x, int n, float above, int first, int32_t* list) {
    int count = 0;
    for (int i = 0; i < n; i += 16) {
        const __mmask16 there = first_lanes(n - i);
        const __m512 v = _mm512_maskz_loadu_ps(there, x + i);
        const __mmask16 active = _mm512_mask_cmp_ps_mask(there, v, _mm512_set1_ps(above), _CMP_GT_OQ);
        const __m512i index = _mm512_add_epi32(_mm512_set1_epi32(first + i), _mm512_loadu_si512(kCount));
        _mm512_storeu_si512(list + count, _mm512_maskz_compress_epi32(active, index));
        count += __builtin_popcount(active);
    }
    return count;
}

int list_nonzero(const int8_t* codes, int n, int32_t* list) {
    int count = 0;
    for (int i = 0; i < n; i += 16) {
        const __mmask16 there = first_lanes(n - i);
        const __m128i v = _mm_maskz_loadu_epi8(there, codes + i);
        const __mmask16 active = _mm_test_epi8_mask(v, v);
        const __m512i index = _mm512_add_epi32(_mm512_set1_epi32(i), _mm512_loadu_si512(kCount));
        _mm512_storeu_si512(list + count, _mm512_maskz_compress_epi32(active, index));
        count += __builtin_popcount(active);
    }
    return count;
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

// --- What the machine can do at best.

template <int streams>
uint64_t read_runs(const uint8_t* data, size_t bytes, int ahead) {
    const size_t run = bytes / streams;
    __m512i sums[streams];
    for (int s = 0; s < streams; ++s) sums[s] = _mm512_setzero_si512();
    for (size_t i = 0; i < run; i += kBlockBytes) {
#pragma GCC unroll 8
        for (int s = 0; s < streams; ++s) {
            const uint8_t* at = data + s * run + i;
            if (ahead) _mm_prefetch(reinterpret_cast<const char*>(at + ahead), _MM_HINT_T0);
            sums[s] = _mm512_xor_si512(sums[s], _mm512_loadu_si512(at));
        }
    }
    uint64_t words[8], sum = 0;
    for (int s = 0; s < streams; ++s) {
        _mm512_storeu_si512(words, sums[s]);
        for (uint64_t word : words) sum ^= word;
    }
    return sum;
}

uint64_t read_stream(const uint8_t* data, size_t bytes, int streams, int ahead) {
    return streams == 1   ? read_runs<1>(data, bytes, ahead)
           : streams == 2 ? read_runs<2>(data, bytes, ahead)
           : streams == 4 ? read_runs<4>(data, bytes, ahead)
                          : read_runs<8>(data, bytes, ahead);
}

int64_t integer_peak(int64_t rounds) {
    constexpr int chains = 16;  // more than two a cycle, each five cycles long
    const __m512i codes = _mm512_set1_epi8(1), x = _mm512_set1_epi8(1);
    __m512i sums[chains];
    for (__m512i& sum : sums) sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
        for (int c = 0; c < chains; ++c) sums[c] = V::dot<255>(sums[c], codes, x);
    }
#pragma GCC unroll 16
    for (int c = 0; c < chains; ++c) asm volatile("" : : "v"(sums[c]));
    return rounds * chains * 64 * 2;
}

ISA_END

}  // namespace

extern const VectorKernels kAvx512Vectors;
constexpr LineKernels kLines = {true, multiply_rows<V>, add_columns<V>, multiply_columns<V>, list_above, list_nonzero};

extern const Kernels kAvx512;
const Kernels kAvx512 = {
    "avx512",
    supported,
    true,
    quantize_row,
    {matmul_tiles<V, Bits<1>>, matmul_tiles<V, Bits<2>>, matmul_tiles<V, Trits>, matmul_tiles<V, Bits<4>>,
     matmul_tiles<V, Bits<8>>},
    matmul_floats<F32>,
    matmul_floats<F16>,
    matmul_floats<BF16>,
    &kAvx512Vectors,
    read_stream,
    integer_peak,

    quantize_groups,
    matmul_groups<V>,

    &kLines,
};

}  // namespace tritkit

#endif

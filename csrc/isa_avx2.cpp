// 256-bit kernels. vpmaddubsw multiplies 32 unsigned bytes (codes) with 32 signed bytes (activations) and adds pairs
// to 16 int16 sums, which must be widened before they can overflow.
#if defined(__x86_64__)

#include <cpuid.h>
#include <immintrin.h>

#include <cstring>

#include "isa_region.h"
#include "kernels.h"

namespace tritkit {
namespace {

bool supported() {
    __builtin_cpu_init();  // also asks the operating system whether it saves the registers (xgetbv)
    unsigned a, b, c, d;   // compilers do not all know the name f16c: leaf 1, ECX bit 29
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
           (c >> 29 & 1);
}

constexpr int kAhead = 4096;  // bytes from the load to the prefetch, in each of the streams

ISA_BEGIN("avx2,fma,f16c")

#include "isa_256.h"

/// Without VNNI a pair of products is an int16 first.
struct V : Vectors256 {
    using Narrow = __m256i;
    static constexpr int kStreams = 2, kFewTokens = 2, kFewTiles = 1, kGroupTokens = 4, kGroupTiles = 1,
                         kPanelTokens = 6, kPanelTiles = 1, kPanelFrom = 35;
    static constexpr bool kUnsignedDot = false;
    template <int largest>
    static constexpr bool narrow() {
        return largest < 64;
    }
    template <int bits>
    static constexpr int places() {
        return bits < 4 ? 2 : 1;
    }

    TRITKIT_INLINE __m256i narrow_zero() { return _mm256_setzero_si256(); }
    TRITKIT_INLINE __m256i dot_narrow(__m256i sum, __m256i codes, __m256i x) {
        __m256i products;
        asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(codes), "x"(x));
        return sum;
    }
    TRITKIT_INLINE __m256i widen(__m256i sum, __m256i narrow) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1)));
    }
    /// A pair of products of whole bytes does not fit into an int16: low and high halves of the codes apart.
    template <int largest>
    TRITKIT_INLINE __m256i dot(__m256i sum, __m256i codes, __m256i x) {
        const __m256i mask = _mm256_set1_epi8(15);
        const __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(codes, mask), x);
        const __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(codes, 4), mask), x);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
    }
};

#include "tile_kernels.h"

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

/// Each 32 columns as quantize_row does with a row.
void quantize_groups(const float* x, int columns, ActivationStrip* strips) {
    const __m256 sign = _mm256_set1_ps(-0.0f), low = _mm256_set1_ps(-127.0f), high = _mm256_set1_ps(127.0f);
    for (; columns > 0; columns -= kStripColumns, x += kStripColumns, ++strips) {
        __m256 v[4], absmax8 = _mm256_setzero_ps();
        for (int i = 0; i < 4; ++i) {
            v[i] = load_up_to_8(x + 8 * i, columns > 8 * i ? columns - 8 * i : 0);
            absmax8 = _mm256_max_ps(_mm256_andnot_ps(sign, v[i]), absmax8);
        }
        float lanes[8], absmax = 0.0f;
        _mm256_storeu_ps(lanes, absmax8);
        for (float lane : lanes) absmax = lane > absmax ? lane : absmax;
        const float inverse = 127.0f / (absmax > 1e-5f ? absmax : 1e-5f);
        strips->scale = 1.0f / inverse;
        alignas(32) int32_t wide[kStripColumns];
        for (int i = 0; i < 4; ++i) {
            const __m256 code = _mm256_round_ps(_mm256_mul_ps(v[i], _mm256_set1_ps(inverse)),
                                                _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            _mm256_store_si256(reinterpret_cast<__m256i*>(wide + 8 * i),
                               _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(code, low), high)));
        }
        set_codes(wide, columns, *strips);
    }
}

/// For any codes of activations.
struct AnyGroupV : V {
    static constexpr int kSpanStreams = 2, kSpanTokens = 4, kSpanTiles = 1;
    template <int>
    TRITKIT_INLINE __m256i start(int32_t) {
        return _mm256_setzero_si256();
    }
};

/// Where codes of activations are never -128, a pair of products of signed bytes does fit into an int16.
struct GroupV : V {
    static constexpr int kSpanStreams = 2, kSpanTokens = 4, kSpanTiles = 1;
    /// A code above 127 is taken as code - 128; the sum begins with what that leaves out.
    template <int largest>
    TRITKIT_INLINE __m256i start(int32_t sum_of_x) {
        return _mm256_set1_epi32(narrow<largest>() ? 0 : 128 * sum_of_x);
    }
    template <int largest>
    TRITKIT_INLINE __m256i dot(__m256i sum, __m256i codes, __m256i x) {
        const __m256i w = _mm256_xor_si256(codes, splat(128));
        const __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
        return widen(sum, products);
    }
};

#include "group_kernels.h"

void matmul_any_groups(const GroupProduct& p) {
    if (!p.has_lowest) return matmul_groups<GroupV>(p);
    switch (p.layout.codes) {
        case GroupCodes::k8:
            return group_product<AnyGroupV, Planes<8, 0>>(p);
        case GroupCodes::kTable8:
            return group_product<AnyGroupV, Table<1>>(p);
        case GroupCodes::kTable16:
            return group_product<AnyGroupV, Table<2>>(p);
        default:  // products with narrower codes fit anyway
            return matmul_groups<GroupV>(p);
    }
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

// --- What the machine can do at best.

template <int streams>
uint64_t read_runs(const uint8_t* data, size_t bytes, int ahead) {
    const size_t run = bytes / streams;
    __m256i sums[streams];
    for (int s = 0; s < streams; ++s) sums[s] = _mm256_setzero_si256();
    for (size_t i = 0; i < run; i += kBlockBytes) {
#pragma GCC unroll 8
        for (int s = 0; s < streams; ++s) {
            const uint8_t* at = data + s * run + i;
            if (ahead) _mm_prefetch(reinterpret_cast<const char*>(at + ahead), _MM_HINT_T0);
            const auto* half = reinterpret_cast<const __m256i*>(at);
            sums[s] = _mm256_xor_si256(sums[s], _mm256_loadu_si256(half));
            sums[s] = _mm256_xor_si256(sums[s], _mm256_loadu_si256(half + 1));
        }
    }
    uint64_t words[4], sum = 0;
    for (int s = 0; s < streams; ++s) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), sums[s]);
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
    constexpr int chains = 8;  // more than the latency of an addition
    __m256i codes = _mm256_set1_epi8(1), x = _mm256_set1_epi8(1), sums[chains];
    for (__m256i& sum : sums) sum = _mm256_setzero_si256();
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 8
        for (int c = 0; c < chains; ++c) {
            asm("" : "+x"(codes));  // other codes, as far as the compiler knows: multiply again
            sums[c] = _mm256_add_epi16(sums[c], _mm256_maddubs_epi16(codes, x));
        }
    }
#pragma GCC unroll 8
    for (int c = 0; c < chains; ++c) asm volatile("" : : "x"(sums[c]));
    return rounds * chains * 32 * 2;
}

ISA_END

}  // namespace

extern const VectorKernels kAvx2Vectors;
extern const Kernels kAvx2;
const Kernels kAvx2 = {
    "avx2",
    supported,
    false,
    quantize_row,
    {matmul_tiles<V, Bits<1>>, matmul_tiles<V, Bits<2>>, matmul_tiles<V, Trits>, matmul_tiles<V, Bits<4>>,
     matmul_tiles<V, Bits<8>>},
    matmul_floats<F32>,
    matmul_floats<F16>,
    matmul_floats<BF16>,
    &kAvx2Vectors,
    read_stream,
    integer_peak,

    quantize_groups,
    matmul_any_groups,

    nullptr,
};

}  // namespace tritkit

#endif

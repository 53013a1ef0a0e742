// The vectors of vector_kernels.h and attention_kernels.h as pairs of 256-bit registers: rows 0 to 7 and 8 to 15.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "floats.h"
#include "isa_region.h"
#include "vector_table.h"

namespace tritkit {
namespace {

ISA_BEGIN("avx2,fma,f16c")

struct Ymm {
    struct F {
        __m256 a, b;
    };
    struct I {
        __m256i a, b;
    };
    using Bytes = I;
    static constexpr int kTiles = 1;  // with four rows of x 8 sums: half of the registers

    TRITKIT_INLINE F load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
    TRITKIT_INLINE F load_first(const float* x, int n) {
        if (n >= 16) return load(x);
        float padded[16] = {};
        memcpy(padded, x, static_cast<size_t>(n) * sizeof(float));
        return load(padded);
    }
    TRITKIT_INLINE void store(float* x, F v) {
        _mm256_storeu_ps(x, v.a);
        _mm256_storeu_ps(x + 8, v.b);
    }
    TRITKIT_INLINE void store_first(float* x, int n, F v) {
        if (n >= 16) return store(x, v);
        float padded[16];
        store(padded, v);
        memcpy(x, padded, static_cast<size_t>(n) * sizeof(float));
    }
    TRITKIT_INLINE F load_f16(const uint16_t* x) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))),
                _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 8)))};
    }
    TRITKIT_INLINE void store_f16(uint16_t* x, F v) {
        v = min(max(v, set1(-65504.0f)), set1(65504.0f));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(x + 8), _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT));
    }
    TRITKIT_INLINE F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    TRITKIT_INLINE F add(F u, F v) { return {_mm256_add_ps(u.a, v.a), _mm256_add_ps(u.b, v.b)}; }
    TRITKIT_INLINE F sub(F u, F v) { return {_mm256_sub_ps(u.a, v.a), _mm256_sub_ps(u.b, v.b)}; }
    TRITKIT_INLINE F mul(F u, F v) { return {_mm256_mul_ps(u.a, v.a), _mm256_mul_ps(u.b, v.b)}; }
    TRITKIT_INLINE F div(F u, F v) { return {_mm256_div_ps(u.a, v.a), _mm256_div_ps(u.b, v.b)}; }
    TRITKIT_INLINE F fma(F u, F v, F w) { return {_mm256_fmadd_ps(u.a, v.a, w.a), _mm256_fmadd_ps(u.b, v.b, w.b)}; }
    TRITKIT_INLINE F abs(F v) {
        const __m256 sign = _mm256_set1_ps(-0.0f);
        return {_mm256_andnot_ps(sign, v.a), _mm256_andnot_ps(sign, v.b)};
    }
    TRITKIT_INLINE F min(F u, F v) { return {_mm256_min_ps(u.a, v.a), _mm256_min_ps(u.b, v.b)}; }
    TRITKIT_INLINE F max(F u, F v) { return {_mm256_max_ps(u.a, v.a), _mm256_max_ps(u.b, v.b)}; }
    TRITKIT_INLINE F select_first(F v, int n, float other) {
        const __m256i count = _mm256_set1_epi32(n);
        const __m256i a = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), b = _mm256_add_epi32(a, _mm256_set1_epi32(8));
        const __m256 rest = _mm256_set1_ps(other);
        return {_mm256_blendv_ps(rest, v.a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, a))),
                _mm256_blendv_ps(rest, v.b, _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, b)))};
    }
    TRITKIT_INLINE float sum(F v) {
        const __m256 eight = _mm256_add_ps(v.a, v.b);
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
    }
    TRITKIT_INLINE float highest(F v) {
        const __m256 eight = _mm256_max_ps(v.a, v.b);
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
    }

    TRITKIT_INLINE I iset1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
    TRITKIT_INLINE I load_both(const void* x) {
        const __m256i* at = static_cast<const __m256i*>(x);
        return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
    }
    TRITKIT_INLINE I iload(const int32_t* x) { return load_both(x); }
    TRITKIT_INLINE void istore(int32_t* x, I v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), v.a);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(x + 8), v.b);
    }
    TRITKIT_INLINE I iadd(I u, I v) { return {_mm256_add_epi32(u.a, v.a), _mm256_add_epi32(u.b, v.b)}; }
    TRITKIT_INLINE I isub(I u, I v) { return {_mm256_sub_epi32(u.a, v.a), _mm256_sub_epi32(u.b, v.b)}; }
    TRITKIT_INLINE I iand(I u, I v) { return {_mm256_and_si256(u.a, v.a), _mm256_and_si256(u.b, v.b)}; }
    template <int k>
    TRITKIT_INLINE I shift_left(I v) {
        return {_mm256_slli_epi32(v.a, k), _mm256_slli_epi32(v.b, k)};
    }
    template <int k>
    TRITKIT_INLINE I shift_right(I v) {
        return {_mm256_srai_epi32(v.a, k), _mm256_srai_epi32(v.b, k)};
    }
    TRITKIT_INLINE int32_t isum(I v) {
        const __m256i eight = _mm256_add_epi32(v.a, v.b);
        __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
        four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
    }
    TRITKIT_INLINE F to_float(I v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
    TRITKIT_INLINE I round(F v) { return {_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)}; }
    TRITKIT_INLINE F power_of_two(I n) {
        const I bits = shift_left<23>(iadd(n, iset1(127)));
        return {_mm256_castsi256_ps(bits.a), _mm256_castsi256_ps(bits.b)};
    }
    TRITKIT_INLINE I load_codes(const uint8_t* x) {
        return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))),
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x + 8)))};
    }
    TRITKIT_INLINE void store_bytes(int8_t* x, I v) {
        v = iand(v, iset1(255));
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(v.a, v.b), 0xd8);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(x),
                         _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
    }

    TRITKIT_INLINE Bytes load_bytes(const uint8_t* x) { return load_both(x); }
    template <int shift, int mask>
    TRITKIT_INLINE __m256i field_of(__m256i v) {
        if constexpr (shift > 0) v = _mm256_srli_epi16(v, shift);
        if constexpr (shift < 0) v = _mm256_slli_epi16(v, -shift);
        return _mm256_and_si256(v, _mm256_set1_epi8(mask));
    }
    template <int shift, int mask>
    TRITKIT_INLINE Bytes field(Bytes v) {
        return {field_of<shift, mask>(v.a), field_of<shift, mask>(v.b)};
    }
    TRITKIT_INLINE Bytes either(Bytes u, Bytes v) { return {_mm256_or_si256(u.a, v.a), _mm256_or_si256(u.b, v.b)}; }
    TRITKIT_INLINE __m256i broadcast4(const int8_t* x) {
        int32_t four;
        memcpy(&four, x, 4);
        return _mm256_set1_epi32(four);
    }
    /// vpmaddubsw's int16 sums of two hold 2 * 127 * 127, so the highest bit of a code goes its own way.
    TRITKIT_INLINE __m256i dot_half(__m256i sum, __m256i codes, __m256i x) {
        const __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(codes, _mm256_set1_epi8(127)), x);
        const __m256i high = _mm256_maddubs_epi16(field_of<7, 1>(codes), x);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(high, _mm256_set1_epi16(128)));
    }
    TRITKIT_INLINE I dot(I sum, Bytes codes, __m256i x) {
        return {dot_half(sum.a, codes.a, x), dot_half(sum.b, codes.b, x)};
    }
    TRITKIT_INLINE I dot_small(I sum, Bytes codes, __m256i x) {
        const __m256i ones = _mm256_set1_epi16(1);
        return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(_mm256_maddubs_epi16(codes.a, x), ones)),
                _mm256_add_epi32(sum.b, _mm256_madd_epi16(_mm256_maddubs_epi16(codes.b, x), ones))};
    }
};

#include "attention_kernels.h"  // and vector_kernels.h

ISA_END

}  // namespace

extern const VectorKernels kAvx2Vectors;
const VectorKernels kAvx2Vectors = {
    encode<Ymm>,    attend_range<Ymm>, merge_partials<Ymm>, rms_norm<Ymm>,
    silu_gate<Ymm>, relu2_gate<Ymm>,   log_sum_exp<Ymm>,
};

}  // namespace tritkit

#endif

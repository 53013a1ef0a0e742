// The vectors of vector_kernels.h and attention_kernels.h as 512-bit registers; codes go through vpdpbusd.
#if defined(__x86_64__)

#if !defined(__clang__)
// gcc 12 calls the deliberately undefined operands inside its own intrinsics uninitialized.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstring>

#include "floats.h"
#include "isa_region.h"
#include "vector_table.h"

namespace tritkit {
namespace {

ISA_BEGIN("avx512f,avx512bw,avx512vl,avx512vnni")

struct Zmm {
    using F = __m512;
    using I = __m512i;
    using Bytes = __m512i;
    static constexpr int kTiles = 4;  // with four rows of x 16 sums: half of the registers

    TRITKIT_INLINE __mmask16 lanes(int n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1 << n) - 1); }
    TRITKIT_INLINE F load(const float* x) { return _mm512_loadu_ps(x); }
    TRITKIT_INLINE F load_first(const float* x, int n) { return _mm512_maskz_loadu_ps(lanes(n), x); }
    TRITKIT_INLINE void store(float* x, F a) { _mm512_storeu_ps(x, a); }
    TRITKIT_INLINE void store_first(float* x, int n, F a) { _mm512_mask_storeu_ps(x, lanes(n), a); }
    TRITKIT_INLINE F load_f16(const uint16_t* x) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    }
    TRITKIT_INLINE void store_f16(uint16_t* x, F a) {
        a = min(max(a, set1(-65504.0f)), set1(65504.0f));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    }
    TRITKIT_INLINE F set1(float x) { return _mm512_set1_ps(x); }
    TRITKIT_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
    TRITKIT_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    TRITKIT_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    TRITKIT_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
    TRITKIT_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    TRITKIT_INLINE F abs(F a) { return _mm512_abs_ps(a); }
    TRITKIT_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
    TRITKIT_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
    TRITKIT_INLINE F select_first(F a, int n, float other) { return _mm512_mask_blend_ps(lanes(n), set1(other), a); }
    TRITKIT_INLINE float sum(F a) {
        const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), upper(a));
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
    }
    TRITKIT_INLINE float highest(F a) {
        const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a), upper(a));
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
    }
    TRITKIT_INLINE __m256 upper(F a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)); }

    TRITKIT_INLINE I iset1(int32_t x) { return _mm512_set1_epi32(x); }
    TRITKIT_INLINE I iload(const int32_t* x) { return _mm512_loadu_si512(x); }
    TRITKIT_INLINE void istore(int32_t* x, I a) { _mm512_storeu_si512(x, a); }
    TRITKIT_INLINE I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
    TRITKIT_INLINE I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
    TRITKIT_INLINE I iand(I a, I b) { return _mm512_and_si512(a, b); }
    template <int k>
    TRITKIT_INLINE I shift_left(I a) {
        return _mm512_slli_epi32(a, k);
    }
    template <int k>
    TRITKIT_INLINE I shift_right(I a) {
        return _mm512_srai_epi32(a, k);
    }
    TRITKIT_INLINE int32_t isum(I a) { return _mm512_reduce_add_epi32(a); }
    TRITKIT_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
    TRITKIT_INLINE I round(F a) { return _mm512_cvtps_epi32(a); }
    TRITKIT_INLINE F power_of_two(I n) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, iset1(127)), 23));
    }
    TRITKIT_INLINE I load_codes(const uint8_t* x) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    }
    TRITKIT_INLINE void store_bytes(int8_t* x, I a) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm512_cvtepi32_epi8(a));
    }

    TRITKIT_INLINE Bytes load_bytes(const uint8_t* x) { return _mm512_loadu_si512(x); }
    template <int shift, int mask>
    TRITKIT_INLINE Bytes field(Bytes a) {
        if constexpr (shift > 0) a = _mm512_srli_epi16(a, shift);
        if constexpr (shift < 0) a = _mm512_slli_epi16(a, -shift);
        return _mm512_and_si512(a, _mm512_set1_epi8(mask));
    }
    TRITKIT_INLINE Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
    TRITKIT_INLINE __m512i broadcast4(const int8_t* x) {
        int32_t four;
        memcpy(&four, x, 4);
        return _mm512_set1_epi32(four);
    }
    // As assembly, since gcc 12 copies and spills around the tied operand of _mm512_dpbusd_epi32.
    TRITKIT_INLINE I dot(I a, Bytes codes, __m512i x) {
        asm("vpdpbusd %2, %1, %0" : "+v"(a) : "v"(codes), "v"(x));
        return a;
    }
    TRITKIT_INLINE I dot_small(I a, Bytes codes, __m512i x) { return dot(a, codes, x); }
};

#include "attention_kernels.h"  // and vector_kernels.h

ISA_END

}  // namespace

extern const VectorKernels kAvx512Vectors;
const VectorKernels kAvx512Vectors = {
    encode<Zmm>,    attend_range<Zmm>, merge_partials<Zmm>, rms_norm<Zmm>,
    silu_gate<Zmm>, relu2_gate<Zmm>,   log_sum_exp<Zmm>,
};

}  // namespace tritkit

#endif

// The vectors of vector_kernels.h and attention_kernels.h as four 128-bit registers each: rows 0 to 3, 4 to 7, ...
#if defined(__aarch64__)

#include <arm_neon.h>

#include <cstring>

#include "floats.h"
#include "isa_region.h"
#include "vector_table.h"

namespace tritkit {
namespace {

#if defined(__clang__)
ISA_BEGIN("dotprod")
#else
ISA_BEGIN("arch=armv8.2-a+dotprod")
#endif

#define EACH(f, u) {f(u.a), f(u.b), f(u.c), f(u.d)}
#define EACH_PAIR(f, u, v) {f(u.a, v.a), f(u.b, v.b), f(u.c, v.c), f(u.d, v.d)}

struct Quad {
    struct F {
        float32x4_t a, b, c, d;
    };
    struct I {
        int32x4_t a, b, c, d;
    };
    struct Bytes {
        uint8x16_t a, b, c, d;
    };
    static constexpr int kTiles = 1;  // with four rows of x 16 sums: half of the registers

    TRITKIT_INLINE F load(const float* x) {
        return {vld1q_f32(x), vld1q_f32(x + 4), vld1q_f32(x + 8), vld1q_f32(x + 12)};
    }
    TRITKIT_INLINE F load_first(const float* x, int n) {
        if (n >= 16) return load(x);
        float padded[16] = {};
        memcpy(padded, x, static_cast<size_t>(n) * sizeof(float));
        return load(padded);
    }
    TRITKIT_INLINE void store(float* x, F v) {
        vst1q_f32(x, v.a);
        vst1q_f32(x + 4, v.b);
        vst1q_f32(x + 8, v.c);
        vst1q_f32(x + 12, v.d);
    }
    TRITKIT_INLINE void store_first(float* x, int n, F v) {
        if (n >= 16) return store(x, v);
        float padded[16];
        store(padded, v);
        memcpy(x, padded, static_cast<size_t>(n) * sizeof(float));
    }
    TRITKIT_INLINE float32x4_t four_halves(const uint16_t* x) {
        return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x)));
    }
    TRITKIT_INLINE F load_f16(const uint16_t* x) {
        return {four_halves(x), four_halves(x + 4), four_halves(x + 8), four_halves(x + 12)};
    }
    TRITKIT_INLINE void store_halves(uint16_t* x, float32x4_t v) { vst1_u16(x, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
    TRITKIT_INLINE void store_f16(uint16_t* x, F v) {
        v = min(max(v, set1(-65504.0f)), set1(65504.0f));
        store_halves(x, v.a);
        store_halves(x + 4, v.b);
        store_halves(x + 8, v.c);
        store_halves(x + 12, v.d);
    }
    TRITKIT_INLINE F set1(float x) {
        const float32x4_t v = vdupq_n_f32(x);
        return {v, v, v, v};
    }
    TRITKIT_INLINE F add(F u, F v) { return EACH_PAIR(vaddq_f32, u, v); }
    TRITKIT_INLINE F sub(F u, F v) { return EACH_PAIR(vsubq_f32, u, v); }
    TRITKIT_INLINE F mul(F u, F v) { return EACH_PAIR(vmulq_f32, u, v); }
    TRITKIT_INLINE F div(F u, F v) { return EACH_PAIR(vdivq_f32, u, v); }
    TRITKIT_INLINE F fma(F u, F v, F w) {
        return {vfmaq_f32(w.a, u.a, v.a), vfmaq_f32(w.b, u.b, v.b), vfmaq_f32(w.c, u.c, v.c), vfmaq_f32(w.d, u.d, v.d)};
    }
    TRITKIT_INLINE F abs(F v) { return EACH(vabsq_f32, v); }
    // Comparisons, since vminq and vmaxq would return what is not a number.
    TRITKIT_INLINE float32x4_t lower(float32x4_t u, float32x4_t v) { return vbslq_f32(vcltq_f32(u, v), u, v); }
    TRITKIT_INLINE float32x4_t higher(float32x4_t u, float32x4_t v) { return vbslq_f32(vcgtq_f32(u, v), u, v); }
    TRITKIT_INLINE F min(F u, F v) { return EACH_PAIR(lower, u, v); }
    TRITKIT_INLINE F max(F u, F v) { return EACH_PAIR(higher, u, v); }
    TRITKIT_INLINE F select_first(F v, int n, float other) {
        const int32_t numbers[4] = {0, 1, 2, 3};
        const int32x4_t lanes = vld1q_s32(numbers);
        const float32x4_t rest = vdupq_n_f32(other);
        return {vbslq_f32(vcltq_s32(lanes, vdupq_n_s32(n)), v.a, rest),
                vbslq_f32(vcltq_s32(lanes, vdupq_n_s32(n - 4)), v.b, rest),
                vbslq_f32(vcltq_s32(lanes, vdupq_n_s32(n - 8)), v.c, rest),
                vbslq_f32(vcltq_s32(lanes, vdupq_n_s32(n - 12)), v.d, rest)};
    }
    TRITKIT_INLINE float sum(F v) {
        const float32x4_t four = vaddq_f32(vaddq_f32(v.a, v.c), vaddq_f32(v.b, v.d));
        const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
        return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
    }
    TRITKIT_INLINE float highest(F v) {
        float lanes[4];
        vst1q_f32(lanes, higher(higher(v.a, v.c), higher(v.b, v.d)));
        for (int half = 2; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
        return lanes[0];
    }

    TRITKIT_INLINE I iset1(int32_t x) {
        const int32x4_t v = vdupq_n_s32(x);
        return {v, v, v, v};
    }
    TRITKIT_INLINE I iload(const int32_t* x) {
        return {vld1q_s32(x), vld1q_s32(x + 4), vld1q_s32(x + 8), vld1q_s32(x + 12)};
    }
    TRITKIT_INLINE void istore(int32_t* x, I v) {
        vst1q_s32(x, v.a);
        vst1q_s32(x + 4, v.b);
        vst1q_s32(x + 8, v.c);
        vst1q_s32(x + 12, v.d);
    }
    TRITKIT_INLINE I iadd(I u, I v) { return EACH_PAIR(vaddq_s32, u, v); }
    TRITKIT_INLINE I isub(I u, I v) { return EACH_PAIR(vsubq_s32, u, v); }
    TRITKIT_INLINE I iand(I u, I v) { return EACH_PAIR(vandq_s32, u, v); }
    template <int k>
    TRITKIT_INLINE I shift_left(I v) {
        return {vshlq_n_s32(v.a, k), vshlq_n_s32(v.b, k), vshlq_n_s32(v.c, k), vshlq_n_s32(v.d, k)};
    }
    template <int k>
    TRITKIT_INLINE I shift_right(I v) {
        return {vshrq_n_s32(v.a, k), vshrq_n_s32(v.b, k), vshrq_n_s32(v.c, k), vshrq_n_s32(v.d, k)};
    }
    TRITKIT_INLINE int32_t isum(I v) { return vaddvq_s32(vaddq_s32(vaddq_s32(v.a, v.b), vaddq_s32(v.c, v.d))); }
    TRITKIT_INLINE F to_float(I v) { return EACH(vcvtq_f32_s32, v); }
    TRITKIT_INLINE int32x4_t round_four(float32x4_t v) {  // by itself it would saturate
        const uint32x4_t fits = vcltq_f32(vabsq_f32(v), vdupq_n_f32(0x1p31f));
        return vbslq_s32(fits, vcvtnq_s32_f32(v), vdupq_n_s32(INT32_MIN));
    }
    TRITKIT_INLINE I round(F v) { return EACH(round_four, v); }
    TRITKIT_INLINE F power_of_two(I n) {
        const I bits = shift_left<23>(iadd(n, iset1(127)));
        return EACH(vreinterpretq_f32_s32, bits);
    }
    TRITKIT_INLINE I load_codes(const uint8_t* x) {
        const uint8x16_t codes = vld1q_u8(x);
        const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(codes)));
        const int16x8_t high = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(codes)));
        return {vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)),
                vmovl_s16(vget_high_s16(high))};
    }
    TRITKIT_INLINE void store_bytes(int8_t* x, I v) {
        const int16x8_t low = vcombine_s16(vmovn_s32(v.a), vmovn_s32(v.b));
        const int16x8_t high = vcombine_s16(vmovn_s32(v.c), vmovn_s32(v.d));
        vst1q_s8(x, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
    }

    TRITKIT_INLINE Bytes load_bytes(const uint8_t* x) {
        return {vld1q_u8(x), vld1q_u8(x + 16), vld1q_u8(x + 32), vld1q_u8(x + 48)};
    }
    template <int shift, int mask>
    TRITKIT_INLINE uint8x16_t field_of(uint8x16_t v) {
        if constexpr (shift > 0) v = vshrq_n_u8(v, shift);
        if constexpr (shift < 0) v = vshlq_n_u8(v, -shift);
        return vandq_u8(v, vdupq_n_u8(mask));
    }
    template <int shift, int mask>
    TRITKIT_INLINE Bytes field(Bytes v) {
        return {field_of<shift, mask>(v.a), field_of<shift, mask>(v.b), field_of<shift, mask>(v.c),
                field_of<shift, mask>(v.d)};
    }
    TRITKIT_INLINE Bytes either(Bytes u, Bytes v) { return EACH_PAIR(vorrq_u8, u, v); }

    TRITKIT_INLINE int32x4_t sdot(int32x4_t sum, uint8x16_t codes, int8x16_t x) {
        asm("sdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(codes), "w"(x));
        return sum;
    }
    /// sdot takes a code above 127 as code - 256, so dot gives it code - 128 and adds 128 * sum(x).
    struct Four {
        int8x16_t x;
        int32x4_t rest;
    };
    TRITKIT_INLINE Four broadcast4(const int8_t* x) {
        int32_t four;
        memcpy(&four, x, 4);
        const int8x16_t wide = vreinterpretq_s8_s32(vdupq_n_s32(four));
        const uint8x16_t half = vdupq_n_u8(64);
        return {wide, sdot(sdot(vdupq_n_s32(0), half, wide), half, wide)};
    }
    TRITKIT_INLINE I dot(I sum, Bytes codes, Four x) {
        const uint8x16_t top = vdupq_n_u8(128);
        return {sdot(vaddq_s32(sum.a, x.rest), veorq_u8(codes.a, top), x.x),
                sdot(vaddq_s32(sum.b, x.rest), veorq_u8(codes.b, top), x.x),
                sdot(vaddq_s32(sum.c, x.rest), veorq_u8(codes.c, top), x.x),
                sdot(vaddq_s32(sum.d, x.rest), veorq_u8(codes.d, top), x.x)};
    }
    TRITKIT_INLINE I dot_small(I sum, Bytes codes, Four x) {
        return {sdot(sum.a, codes.a, x.x), sdot(sum.b, codes.b, x.x), sdot(sum.c, codes.c, x.x),
                sdot(sum.d, codes.d, x.x)};
    }
};

#undef EACH
#undef EACH_PAIR

#include "attention_kernels.h"  // and vector_kernels.h

ISA_END

}  // namespace

extern const VectorKernels kNeonVectors;
const VectorKernels kNeonVectors = {
    encode<Quad>,    attend_range<Quad>, merge_partials<Quad>, rms_norm<Quad>,
    silu_gate<Quad>, relu2_gate<Quad>,   log_sum_exp<Quad>,
};

}  // namespace tritkit

#endif

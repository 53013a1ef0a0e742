// 128-bit kernels for 64-bit ARM with the dot products of ARMv8.2. sdot multiplies 16 signed bytes (codes) with 16
// signed bytes (activations) and adds groups of four to 4 int32 sums: a quarter of a block of a T16 tile, 4 rows.
// Processors without sdot take the scalar kernels.
#if defined(__aarch64__)

#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include <cstring>

#include "isa_region.h"
#include "kernels.h"

namespace tritkit {
namespace {

bool supported() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP, by its number since old headers lack it
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has;
#else
    return false;
#endif
}

constexpr int kAhead = 1024;  // bytes from the load to the prefetch, in each of the streams

#if defined(__clang__)
ISA_BEGIN("dotprod")
#else
ISA_BEGIN("arch=armv8.2-a+dotprod")
#endif

/// A quarter of a block in one register; tile_kernels.h says what each of these is for.
struct V {
    using Bytes = uint8x16_t;
    using Ints = int32x4_t;
    static constexpr int kBytes = 16, kStreams = 1, kFewTokens = 2, kFewTiles = 1, kGroupTokens = 4, kGroupTiles = 1,
                         kPanelTokens = 6, kPanelTiles = 1, kPanelFrom = 9;
    static constexpr bool kUnsignedDot = true, kByteShifts = true;
    template <int largest>
    static constexpr bool narrow() {
        return false;
    }
    template <int bits>
    static constexpr int places() {  // a field in the highest bit would be negative
        return bits == 1 ? 4 : bits == 2 ? 3 : 1;
    }

    TRITKIT_INLINE uint8x16_t load(const uint8_t* p) { return vld1q_u8(p); }
    TRITKIT_INLINE void store_bytes(uint8_t* p, uint8x16_t v) { vst1q_u8(p, v); }
    TRITKIT_INLINE uint8x16_t splat(uint8_t byte) { return vdupq_n_u8(byte); }
    TRITKIT_INLINE uint8x16_t both(uint8x16_t a, uint8x16_t b) { return vandq_u8(a, b); }
    TRITKIT_INLINE uint8x16_t add(uint8x16_t a, uint8x16_t b) { return vaddq_u8(a, b); }
    template <int n>
    TRITKIT_INLINE uint8x16_t shift_right(uint8x16_t v) {
        if constexpr (n == 0) return v;
        return vshrq_n_u8(v, n ? n : 1);
    }
    TRITKIT_INLINE uint8x16_t trit(uint8x16_t q) {  // 3 q >> 8
        return vshrq_n_u8(vhaddq_u8(q, vshrq_n_u8(q, 1)), 6);
    }

    /// The activations of 4 fields, and which of them to take: sdot picks them out of the register by itself.
    struct Four {
        int8x16_t fields;
        int field;
    };
    TRITKIT_INLINE Four broadcast4(const int8_t* x, int field) { return {vld1q_s8(x + field / 4 * 16), field % 4}; }

    template <int field>
    TRITKIT_INLINE int32x4_t sdot(int32x4_t sum, uint8x16_t codes, int8x16_t x) {
        asm("sdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(sum) : "w"(codes), "w"(x), "i"(field));
        return sum;
    }
    /// A code above 127 is taken as code - 128; the sum begins with what that leaves out.
    template <int largest>
    TRITKIT_INLINE int32x4_t start(int32_t sum_of_x) {
        return vdupq_n_s32(largest > 127 ? 128 * sum_of_x : 0);
    }
    template <int largest>
    TRITKIT_INLINE int32x4_t dot(int32x4_t sum, uint8x16_t codes, Four x) {
        if (largest > 127) codes = veorq_u8(codes, splat(128));
        switch (x.field) {  // known as soon as the loop over the fields is unrolled
            case 0:
                return sdot<0>(sum, codes, x.fields);
            case 1:
                return sdot<1>(sum, codes, x.fields);
            case 2:
                return sdot<2>(sum, codes, x.fields);
            default:
                return sdot<3>(sum, codes, x.fields);
        }
    }

    TRITKIT_INLINE int32x4_t splat32(int32_t value) { return vdupq_n_s32(value); }
    TRITKIT_INLINE int32x4_t plus(int32x4_t a, int32x4_t b) { return vaddq_s32(a, b); }
    TRITKIT_INLINE int32x4_t minus(int32x4_t a, int32x4_t b) { return vsubq_s32(a, b); }
    TRITKIT_INLINE int32x4_t shift_left(int32x4_t v, int n) { return vshlq_s32(v, vdupq_n_s32(n)); }
    TRITKIT_INLINE int32x4_t shift_right32(int32x4_t v, int n) { return vshlq_s32(v, vdupq_n_s32(-n)); }
    TRITKIT_INLINE int32x4_t load32(const int32_t* p) { return vld1q_s32(p); }
    TRITKIT_INLINE void store(int32_t* p, int32x4_t v) { vst1q_s32(p, v); }

    // --- For grouped weights: group_kernels.h says what each of these is for.
    using Floats = float32x4_t;
    static constexpr int kSpanStreams = 1, kSpanTokens = 2, kSpanTiles = 1;
    template <int n>
    TRITKIT_INLINE uint8x16_t shift_left(uint8x16_t v) {
        return vshlq_n_u8(v, n);
    }
    TRITKIT_INLINE uint8x16_t merge(uint8x16_t a, uint8x16_t b, uint8x16_t mask) {
        return vorrq_u8(a, vandq_u8(b, mask));
    }
    TRITKIT_INLINE uint8x16_t load_table(const uint8_t* p) { return vld1q_u8(p); }
    TRITKIT_INLINE uint8x16_t lookup(uint8x16_t table, uint8x16_t codes) { return vqtbl1q_u8(table, codes); }
    TRITKIT_INLINE float32x4_t no_floats() { return vdupq_n_f32(0.0f); }
    TRITKIT_INLINE float32x4_t load_floats(const float* p) { return vld1q_f32(p); }
    TRITKIT_INLINE void store_floats(float* p, float32x4_t v) { vst1q_f32(p, v); }
    TRITKIT_INLINE float32x4_t splat_floats(float value) { return vdupq_n_f32(value); }
    TRITKIT_INLINE float32x4_t to_floats(int32x4_t v) { return vcvtq_f32_s32(v); }
    TRITKIT_INLINE uint8x8_t four_bytes(const uint8_t* p) {
        uint32_t four;
        memcpy(&four, p, 4);
        return vreinterpret_u8_u32(vdup_n_u32(four));
    }
    TRITKIT_INLINE float32x4_t halves(const uint8_t* p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
    TRITKIT_INLINE float32x4_t int8s(const uint8_t* p) {
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(four_bytes(p))))));
    }
    TRITKIT_INLINE float32x4_t uint8s(const uint8_t* p) {
        return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(four_bytes(p)))));
    }
    TRITKIT_INLINE float32x4_t nibbles(const uint8_t* p, int shift) {
        const uint8x8_t moved = vshl_u8(four_bytes(p), vdup_n_s8(static_cast<int8_t>(-shift)));
        return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vand_u8(moved, vdup_n_u8(15))))));
    }
    TRITKIT_INLINE float32x4_t times(float32x4_t a, float32x4_t b) { return vmulq_f32(a, b); }
    TRITKIT_INLINE float32x4_t subtract(float32x4_t a, float32x4_t b) { return vsubq_f32(a, b); }
    TRITKIT_INLINE float32x4_t fma(float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }
};

#include "tile_kernels.h"

/// Four floats, zeros beyond the end of the row.
TRITKIT_INLINE float32x4_t load_up_to_4(const float* x, int left) {
    if (left >= 4) return vld1q_f32(x);
    float padded[4] = {};
    memcpy(padded, x, static_cast<size_t>(left) * sizeof(float));
    return vld1q_f32(padded);
}

float quantize_row(const float* x, int columns, float levels, int8_t* codes, int32_t* sum) {
    // Comparisons and selections as in the scalar code, so that "not a number" goes the same way.
    float32x4_t absmax4 = vdupq_n_f32(0.0f);
    for (int i = 0; i < columns; i += 4) {
        const float32x4_t size = vabsq_f32(load_up_to_4(x + i, columns - i));
        absmax4 = vbslq_f32(vcgtq_f32(size, absmax4), size, absmax4);
    }
    const float absmax = vmaxvq_f32(absmax4);
    const float inverse = levels / (absmax > 1e-5f ? absmax : 1e-5f);
    const float32x4_t factor = vdupq_n_f32(inverse), low = vdupq_n_f32(-128.0f), high = vdupq_n_f32(127.0f);
    int32x4_t total = vdupq_n_s32(0);
    for (int i = 0; i < columns; i += 4) {
        float32x4_t v = vrndnq_f32(vmulq_f32(load_up_to_4(x + i, columns - i), factor));
        v = vbslq_f32(vcgtq_f32(v, low), v, low);
        v = vbslq_f32(vcltq_f32(v, high), v, high);
        const int32x4_t wide = vcvtq_s32_f32(v);
        const int16x4_t half = vmovn_s32(wide);
        const int8x8_t bytes = vmovn_s16(vcombine_s16(half, half));
        if (columns - i >= 4) {
            total = vaddq_s32(total, wide);
            memcpy(codes + i, &bytes, 4);
        } else {
            int8_t last[8];
            vst1_s8(last, bytes);
            for (int j = 0; i + j < columns; ++j) {
                codes[i + j] = last[j];
                total = vsetq_lane_s32(vgetq_lane_s32(total, 0) + last[j], total, 0);
            }
        }
    }
    *sum = vaddvq_s32(total);
    return 1.0f / inverse;
}

/// Each 32 columns as quantize_row does with a row.
void quantize_groups(const float* x, int columns, ActivationStrip* strips) {
    const float32x4_t low = vdupq_n_f32(-127.0f), high = vdupq_n_f32(127.0f);
    for (; columns > 0; columns -= kStripColumns, x += kStripColumns, ++strips) {
        float32x4_t v[8], absmax4 = vdupq_n_f32(0.0f);
        for (int i = 0; i < 8; ++i) {
            v[i] = load_up_to_4(x + 4 * i, columns > 4 * i ? columns - 4 * i : 0);
            const float32x4_t size = vabsq_f32(v[i]);
            absmax4 = vbslq_f32(vcgtq_f32(size, absmax4), size, absmax4);
        }
        const float absmax = vmaxvq_f32(absmax4), inverse = 127.0f / (absmax > 1e-5f ? absmax : 1e-5f);
        strips->scale = 1.0f / inverse;
        alignas(16) int32_t wide[kStripColumns];
        for (int i = 0; i < 8; ++i) {
            float32x4_t code = vrndnq_f32(vmulq_f32(v[i], vdupq_n_f32(inverse)));
            code = vbslq_f32(vcgtq_f32(code, low), code, low);
            code = vbslq_f32(vcltq_f32(code, high), code, high);
            vst1q_s32(wide + 4 * i, vcvtq_s32_f32(code));
        }
        set_codes(wide, columns, *strips);
    }
}

#include "group_kernels.h"

struct F32 {
    using Element = float;
    TRITKIT_INLINE float32x4_t load4(const float* w) { return vld1q_f32(w); }
};
struct F16 {
    using Element = uint16_t;
    TRITKIT_INLINE float32x4_t load4(const uint16_t* w) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(w))); }
};
struct BF16 {
    using Element = uint16_t;
    TRITKIT_INLINE float32x4_t load4(const uint16_t* w) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(w), 16)); }
};

/// Rows row, row + distance ... with some tokens. Every sum is one chain along the columns, whatever its neighbours.
template <class Format, int rows, int tokens>
void float_block(const FloatProduct& p, int row, int distance, int token) {
    const auto* w = static_cast<const typename Format::Element*>(p.weights) + row * p.row_stride;
    const ptrdiff_t stride = distance * p.row_stride;
    const float* x = p.x + token * p.x_stride;
    float32x4_t sums[rows][tokens];
    for (int r = 0; r < rows; ++r)
        for (int t = 0; t < tokens; ++t) sums[r][t] = vdupq_n_f32(0.0f);
    for (int k = 0; k < p.columns; k += 4) {
        float32x4_t v[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) v[r] = Format::load4(w + r * stride + k);
#pragma GCC unroll 2
        for (int t = 0; t < tokens; ++t) {
            const float32x4_t xt = vld1q_f32(x + t * p.x_stride + k);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) sums[r][t] = vfmaq_f32(sums[r][t], v[r], xt);
        }
    }
    for (int r = 0; r < rows; ++r)
        for (int t = 0; t < tokens; ++t)
            p.out[(token + t) * p.out_stride + (row + r * distance - p.row_begin)] = vaddvq_f32(sums[r][t]);
}

template <class Format>
void matmul_floats(const FloatProduct& p) {
    constexpr int panel = 64;  // with many tokens, so many rows stay in cache
    const int n = p.row_end - p.row_begin, step = p.tokens <= 2 ? (n > 0 ? n : 1) : panel;
    for (int begin = p.row_begin; begin < p.row_end; begin += step) {
        const int end = begin + step < p.row_end ? begin + step : p.row_end, eighth = (end - begin) / 8;
        for (int t = 0; t < p.tokens; t += 2) {
            const bool two = t + 2 <= p.tokens;
            for (int i = 0; i < eighth; ++i)
                two ? float_block<Format, 8, 2>(p, begin + i, eighth, t)
                    : float_block<Format, 8, 1>(p, begin + i, eighth, t);
            for (int r = begin + 8 * eighth; r < end; ++r)
                two ? float_block<Format, 1, 2>(p, r, 0, t) : float_block<Format, 1, 1>(p, r, 0, t);
        }
    }
}

template <int streams>
uint64_t read_runs(const uint8_t* data, size_t bytes, int ahead) {
    const size_t run = bytes / streams;
    uint8x16_t sums[streams];
    for (int s = 0; s < streams; ++s) sums[s] = vdupq_n_u8(0);
    for (size_t i = 0; i < run; i += kBlockBytes) {
#pragma GCC unroll 8
        for (int s = 0; s < streams; ++s) {
            const uint8_t* at = data + s * run + i;
            if (ahead) __builtin_prefetch(at + ahead);
            const uint8x16_t low = veorq_u8(vld1q_u8(at), vld1q_u8(at + 16));
            sums[s] = veorq_u8(sums[s], veorq_u8(low, veorq_u8(vld1q_u8(at + 32), vld1q_u8(at + 48))));
        }
    }
    uint8x16_t sum = sums[0];
    for (int s = 1; s < streams; ++s) sum = veorq_u8(sum, sums[s]);
    return vgetq_lane_u64(vreinterpretq_u64_u8(sum), 0) ^ vgetq_lane_u64(vreinterpretq_u64_u8(sum), 1);
}

uint64_t read_stream(const uint8_t* data, size_t bytes, int streams, int ahead) {
    return streams == 1   ? read_runs<1>(data, bytes, ahead)
           : streams == 2 ? read_runs<2>(data, bytes, ahead)
           : streams == 4 ? read_runs<4>(data, bytes, ahead)
                          : read_runs<8>(data, bytes, ahead);
}

int64_t integer_peak(int64_t rounds) {
    constexpr int chains = 16;  // more than the latency of sdot times the number of its units
    const uint8x16_t codes = vdupq_n_u8(1);
    const V::Four x{vdupq_n_s8(3), 0};
    int32x4_t sums[chains];
    for (int c = 0; c < chains; ++c) sums[c] = vdupq_n_s32(c);  // each its own, else one chain would do for all
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
        for (int c = 0; c < chains; ++c) sums[c] = V::dot<1>(sums[c], codes, x);
    }
#pragma GCC unroll 16
    for (int c = 0; c < chains; ++c) asm volatile("" : : "w"(sums[c]));
    return rounds * chains * 16 * 2;
}

ISA_END

}  // namespace

extern const VectorKernels kNeonVectors;
extern const Kernels kNeon;
const Kernels kNeon = {
    "neon",
    supported,
    false,
    quantize_row,
    {matmul_tiles<V, Bits<1>>, matmul_tiles<V, Bits<2>>, matmul_tiles<V, Trits>, matmul_tiles<V, Bits<4>>,
     matmul_tiles<V, Bits<8>>},
    matmul_floats<F32>,
    matmul_floats<F16>,
    matmul_floats<BF16>,
    &kNeonVectors,
    read_stream,
    integer_peak,

    quantize_groups,
    matmul_groups<V>,

    nullptr,
};

}  // namespace tritkit

#endif

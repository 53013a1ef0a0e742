// The vectors of vector_kernels.h and attention_kernels.h as plain arrays: what each operation means.
#include <cmath>
#include <cstring>

#include "floats.h"
#include "isa_region.h"
#include "vector_table.h"

// Arrays, not registers: inlining everything gains little here, and sanitizers would compile for minutes.
#undef TRITKIT_INLINE
#define TRITKIT_INLINE static __attribute__((noinline))

namespace tritkit {
namespace {

struct Plain {
    struct F {
        float v[16];
    };
    struct I {
        int32_t v[16];
    };
    struct Bytes {
        uint8_t v[64];  // 16 rows of 4
    };
    static constexpr int kTiles = 1;  // tiles of a product that go together

#define LANEWISE(Result, expression)                    \
    Result out;                                         \
    for (int i = 0; i < 16; ++i) out.v[i] = expression; \
    return out

    // --- floats
    static F load(const float* x) { LANEWISE(F, x[i]); }
    static F load_first(const float* x, int n) { LANEWISE(F, i < n ? x[i] : 0.0f); }
    static void store(float* x, F a) { std::memcpy(x, a.v, sizeof a.v); }
    static void store_first(float* x, int n, F a) {
        for (int i = 0; i < 16 && i < n; ++i) x[i] = a.v[i];
    }
    static F load_f16(const uint16_t* x) { LANEWISE(F, float_from_f16(x[i])); }
    /// Beyond float16's range: the largest finite one.
    static void store_f16(uint16_t* x, F a) {
        for (int i = 0; i < 16; ++i) x[i] = f16_from_float(a.v[i]);
    }
    static F set1(float x) { LANEWISE(F, x); }
    static F add(F a, F b) { LANEWISE(F, a.v[i] + b.v[i]); }
    static F sub(F a, F b) { LANEWISE(F, a.v[i] - b.v[i]); }
    static F mul(F a, F b) { LANEWISE(F, a.v[i] * b.v[i]); }
    static F div(F a, F b) { LANEWISE(F, a.v[i] / b.v[i]); }
    static F fma(F a, F b, F c) { LANEWISE(F, std::fma(a.v[i], b.v[i], c.v[i])); }  // a * b + c, rounded once
    static F abs(F a) { LANEWISE(F, std::fabs(a.v[i])); }
    static F min(F a, F b) { LANEWISE(F, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }  // b if one is not a number
    static F max(F a, F b) { LANEWISE(F, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
    static F select_first(F a, int n, float other) { LANEWISE(F, i < n ? a.v[i] : other); }
    /// Halves onto each other, down to one.
    static float sum(F a) {
        for (int half = 8; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
        return a.v[0];
    }
    static float highest(F a) {
        for (int half = 8; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
        return a.v[0];
    }

    // --- integers; sums wrap
    static I iset1(int32_t x) { LANEWISE(I, x); }
    static I iload(const int32_t* x) { LANEWISE(I, x[i]); }
    static void istore(int32_t* x, I a) { std::memcpy(x, a.v, sizeof a.v); }
    static int32_t wrapped(uint32_t x) { return static_cast<int32_t>(x); }
    static I iadd(I a, I b) { LANEWISE(I, wrapped(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i]))); }
    static I isub(I a, I b) { LANEWISE(I, wrapped(static_cast<uint32_t>(a.v[i]) - static_cast<uint32_t>(b.v[i]))); }
    static I iand(I a, I b) { LANEWISE(I, a.v[i] & b.v[i]); }
    template <int k>
    static I shift_left(I a) {
        LANEWISE(I, wrapped(static_cast<uint32_t>(a.v[i]) << k));
    }
    template <int k>
    static I shift_right(I a) {
        LANEWISE(I, a.v[i] >> k);
    }
    static int32_t isum(I a) {
        int32_t sum = 0;
        for (int32_t value : a.v) sum += value;
        return sum;
    }
    static F to_float(I a) { LANEWISE(F, static_cast<float>(a.v[i])); }
    /// Halves to even; what is no int32 becomes the lowest one.
    static I round(F a) {
        LANEWISE(I, std::fabs(a.v[i]) < 0x1p31f ? static_cast<int32_t>(std::nearbyintf(a.v[i])) : INT32_MIN);
    }
    static F power_of_two(I n) { LANEWISE(F, float_from_bits(static_cast<uint32_t>(n.v[i] + 127) << 23)); }
    static I load_codes(const uint8_t* x) { LANEWISE(I, x[i]); }
    static void store_bytes(int8_t* x, I a) {  // the low byte of each
        for (int i = 0; i < 16; ++i) x[i] = static_cast<int8_t>(a.v[i] & 255);
    }

    // --- bytes
    static Bytes load_bytes(const uint8_t* x) {
        Bytes a;
        std::memcpy(a.v, x, sizeof a.v);
        return a;
    }
    /// Each byte shifted right (negative: left), then masked; bits from the neighbour byte must not reach the mask.
    template <int shift, int mask>
    static Bytes field(Bytes a) {
        for (uint8_t& byte : a.v) byte = static_cast<uint8_t>((shift < 0 ? byte << -shift : byte >> shift) & mask);
        return a;
    }
    static Bytes either(Bytes a, Bytes b) {
        for (int i = 0; i < 64; ++i) a.v[i] |= b.v[i];
        return a;
    }
    struct Four {
        int8_t v[4];
    };
    static Four broadcast4(const int8_t* x) { return {{x[0], x[1], x[2], x[3]}}; }
    /// a + the products of each row's four codes (0 to 255) with x (-127 to 127).
    static I dot(I a, Bytes codes, Four x) {
        for (int i = 0; i < 64; ++i) a.v[i / 4] += codes.v[i] * x.v[i % 4];
        return a;
    }
    /// The same for codes of at most 15.
    static I dot_small(I a, Bytes codes, Four x) { return dot(a, codes, x); }
};

#undef LANEWISE

#include "attention_kernels.h"  // and vector_kernels.h

}  // namespace

extern const VectorKernels kScalarVectors;
const VectorKernels kScalarVectors = {
    encode<Plain>,    attend_range<Plain>, merge_partials<Plain>, rms_norm<Plain>,
    silu_gate<Plain>, relu2_gate<Plain>,   log_sum_exp<Plain>,
};

}  // namespace tritkit

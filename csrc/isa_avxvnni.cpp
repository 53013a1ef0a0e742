// 256-bit kernels with vpdpbusd (AVX-VNNI), which processors without AVX-512 have. The rest is inherited from AVX2.
#if defined(__x86_64__)

#include <cpuid.h>
#include <immintrin.h>

#include <cstring>

#include "isa_region.h"
#include "kernels.h"

namespace tritkit {
namespace {

bool supported() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;
    unsigned a, b, c, d;  // compilers do not all know the names: F16C is leaf 1, ECX bit 29
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 29 & 1)) return false;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);  // leaf 7, subleaf 1, EAX bit 4
}

constexpr int kAhead = 4096;  // bytes from the load to the prefetch, in each of the streams

ISA_BEGIN("avx2,fma,f16c,avxvnni")

#include "isa_256.h"

struct V : Vectors256 {
    static constexpr int kSpanStreams = 2, kSpanTokens = 4, kSpanTiles = 1;
    static constexpr int kStreams = 1, kFewTokens = 2, kFewTiles = 2, kGroupTokens = 5, kGroupTiles = 1,
                         kPanelTokens = 6, kPanelTiles = 1, kPanelFrom = 35;
    static constexpr bool kUnsignedDot = true;
    template <int largest>
    static constexpr bool narrow() {
        return false;
    }
    template <int bits>
    static constexpr int places() {
        return bits == 1 ? 4 : 8 / bits;
    }
    template <int largest>
    TRITKIT_INLINE __m256i dot(__m256i sum, __m256i codes, __m256i x) {
        asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(x));
        return sum;
    }
};

// clang-format off: the second needs the first
#include "tile_kernels.h"
#include "group_kernels.h"
// clang-format on

// --- What the machine can do at best.

int64_t integer_peak(int64_t rounds) {
    constexpr int chains = 12;  // more than two a cycle, each five cycles long
    const __m256i codes = V::splat(1), x = V::splat(1);
    __m256i sums[chains];
    for (__m256i& sum : sums) sum = _mm256_setzero_si256();
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
        for (int c = 0; c < chains; ++c) sums[c] = V::dot<255>(sums[c], codes, x);
    }
#pragma GCC unroll 12
    for (int c = 0; c < chains; ++c) asm volatile("" : : "x"(sums[c]));
    return rounds * chains * 32 * 2;
}

ISA_END

}  // namespace

extern const Kernels kAvxVnni;
const Kernels kAvxVnni = {
    "avxvnni",
    supported,
    false,
    nullptr,
    {matmul_tiles<V, Bits<1>>, matmul_tiles<V, Bits<2>>, matmul_tiles<V, Trits>, matmul_tiles<V, Bits<4>>,
     matmul_tiles<V, Bits<8>>},
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    integer_peak,

    nullptr,
    matmul_groups<V>,

    nullptr,
};

}  // namespace tritkit

#endif

// The specification: written to be read, never tuned. Every other instruction set equals it,
// bit for bit in quantize_row and in the integer products, up to the order of the sum in the float products.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "floats.h"
#include "kernels.h"

namespace tritkit {
namespace {

float quantize_row(const float* x, int columns, float levels, int8_t* codes, int32_t* sum) {
    float absmax = 0.0f;
    for (int i = 0; i < columns; ++i) absmax = std::fabs(x[i]) > absmax ? std::fabs(x[i]) : absmax;
    const float inverse = levels / std::max(absmax, 1e-5f);
    int32_t total = 0;
    for (int i = 0; i < columns; ++i) {
        float code = std::nearbyintf(x[i] * inverse);  // halves to even
        code = code > -128.0f ? code : -128.0f;        // not a number goes here too
        code = code < 127.0f ? code : 127.0f;
        codes[i] = static_cast<int8_t>(code);
        total += codes[i];
    }
    *sum = total;
    return 1.0f / inverse;
}

/// Codes of `bits` bits: field f in bits f * bits ...
template <int bits>
int bits_of(int byte, int field) {
    return byte >> (bits * field) & ((1 << bits) - 1);
}

/// Five trits: each product with 3 brings the next one into the byte above, and leaves the rest below.
int trit_of(int byte, int field) {
    for (int f = 0; f < field; ++f) byte = 3 * byte & 255;
    return 3 * byte >> 8;
}

template <TileLayout layout, int (*code)(int byte, int field)>
void matmul_tiles(const TileProduct& p) {
    constexpr int columns = facts(layout).columns;
    for (int t = 0; t < p.tokens; ++t) {
        const int8_t* x = p.codes + t * p.code_stride;
        int32_t* out = p.out + t * p.out_stride;
        for (int tile = p.tile_begin; tile < p.tile_end; ++tile) {
            const uint8_t* w = p.weights + static_cast<ptrdiff_t>(tile) * p.blocks * kBlockBytes;
            for (int r = 0; r < kTileRows; ++r, ++out) {
                int32_t sum = 0;
                for (int k = 0; k < p.blocks * columns; ++k) {
                    const uint8_t byte = w[k / columns * kBlockBytes + 4 * r + k % 4];
                    sum += code(byte, k % columns / 4) * x[k];
                }
                *out = (p.accumulate ? *out : 0) + sum * (1 << p.shift) - p.offset * p.sums[t];
            }
        }
    }
}

template <class Element, float (*value)(Element)>
void matmul_floats(const FloatProduct& p) {
    for (int t = 0; t < p.tokens; ++t) {
        const float* x = p.x + t * p.x_stride;
        for (int r = p.row_begin; r < p.row_end; ++r) {
            const Element* w = static_cast<const Element*>(p.weights) + r * p.row_stride;
            float sum = 0.0f;
            for (int k = 0; k < p.columns; ++k) sum += value(w[k]) * x[k];
            p.out[t * p.out_stride + (r - p.row_begin)] = sum;
        }
    }
}

float identity(float value) { return value; }

bool supported() { return true; }

// --- What the machine can do at best.

uint64_t read_stream(const uint8_t* data, size_t bytes, int streams, int ahead) {
    const size_t run = bytes / static_cast<size_t>(streams);
    uint64_t sum = 0;
    for (size_t i = 0; i < run; i += kBlockBytes) {
        for (int s = 0; s < streams; ++s) {
            const uint8_t* at = data + static_cast<size_t>(s) * run + i;
            if (ahead) __builtin_prefetch(at + ahead);
            uint64_t words[kBlockBytes / 8];
            std::memcpy(words, at, kBlockBytes);
            for (uint64_t word : words) sum ^= word;
        }
    }
    return sum;
}

int64_t integer_peak(int64_t rounds) {
    int8_t w[kBlockBytes], x[kBlockBytes];
    std::memset(w, 1, sizeof w);
    std::memset(x, 3, sizeof x);
    int32_t sum = 0;
    for (int64_t i = 0; i < rounds; ++i) {
        asm volatile("" : : "r"(w), "r"(x) : "memory");  // they may have changed: multiply again
        int32_t block = 0;
        for (int k = 0; k < kBlockBytes; ++k) block += w[k] * x[k];
        sum ^= block;
    }
    asm volatile("" : : "r"(sum));
    return rounds * 2 * kBlockBytes;
}

}  // namespace

extern const VectorKernels kScalarVectors;
extern const Kernels kScalar;
const Kernels kScalar = {
    "scalar",
    supported,
    quantize_row,
    {matmul_tiles<TileLayout::kT16_1, bits_of<1>>, matmul_tiles<TileLayout::kT16_2, bits_of<2>>,
     matmul_tiles<TileLayout::kT16_3, trit_of>, matmul_tiles<TileLayout::kT16_4, bits_of<4>>,
     matmul_tiles<TileLayout::kT16_8, bits_of<8>>},
    matmul_floats<float, identity>,
    matmul_floats<uint16_t, float_from_f16>,
    matmul_floats<uint16_t, float_from_bf16>,
    &kScalarVectors,
    read_stream,
    integer_peak,
};

}  // namespace tritkit

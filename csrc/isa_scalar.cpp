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

// --- Weights and activations in groups.

void quantize_groups(const float* x, int columns, ActivationStrip* strips) {
    for (; columns > 0; columns -= kStripColumns, x += kStripColumns, ++strips) {
        const int count = std::min(columns, kStripColumns);
        float absmax = 0.0f;
        for (int i = 0; i < count; ++i) absmax = std::fabs(x[i]) > absmax ? std::fabs(x[i]) : absmax;
        const float inverse = 127.0f / std::max(absmax, 1e-5f);
        strips->scale = 1.0f / inverse;
        int32_t codes[kStripColumns] = {};
        for (int i = 0; i < count; ++i) {
            float code = std::nearbyintf(x[i] * inverse);  // halves to even
            code = code > -127.0f ? code : -127.0f;        // not a number goes here too
            code = code < 127.0f ? code : 127.0f;
            codes[i] = static_cast<int32_t>(code);
        }
        set_codes(codes, count, *strips);
    }
}

/// The code of a row and a column of 32 in a plane of a strip.
int plane_code(const uint8_t* plane, int bits, int row, int column) {
    const int block_columns = 32 / bits;
    const uint8_t byte = plane[column / block_columns * kBlockBytes + 4 * row + column % 4];
    return byte >> (column % block_columns / 4 * bits) & ((1 << bits) - 1);
}

/// What the integer product multiplies with: the code or the number of the table, less the bias.
int grouped_number(const GroupProduct& p, const uint8_t* strip, int row, int column) {
    const int bias = p.bias_bits < 0 ? 0 : 1 << p.bias_bits;
    const int low_bits = p.layout.low_bits();
    int code = plane_code(strip, low_bits, row, column);
    if (p.layout.codes == GroupCodes::kTable8) return p.table[code] - bias;
    if (p.layout.codes == GroupCodes::kTable16) return (p.table[code] - bias) * 256 + p.table[16 + code];
    const int high_bits = p.layout.strip_blocks() - low_bits;
    if (high_bits) code |= plane_code(strip + low_bits * kBlockBytes, high_bits, row, column) << low_bits;
    return code - bias;
}

float half_at(const uint8_t* bytes, int row) {
    uint16_t half;
    std::memcpy(&half, bytes + 2 * row, sizeof half);
    return float_from_f16(half);
}

float float_at(const uint8_t* bytes, int row) {
    float value;
    std::memcpy(&value, bytes + 4 * row, sizeof value);
    return value;
}

float grouped_scale(const GroupLayout& g, const uint8_t* header, const uint8_t* at, int row) {
    switch (g.scales) {
        case GroupScales::kHalf:
            return half_at(at, row);
        case GroupScales::kFloat:
            return float_at(at, row);
        case GroupScales::kTwoLevel:
            return half_at(header, row) * static_cast<int8_t>(at[row]);
        default:
            return half_at(header, row) * static_cast<float>(at[row] & 15);
    }
}

float grouped_offset(const GroupLayout& g, const uint8_t* header, const uint8_t* at, int row, float scale) {
    const int small = g.scales == GroupScales::kTwoLevel4 ? at[row] >> 4 : at[g.scale_bytes() + row];
    switch (g.offsets) {
        case GroupOffsets::kNone:
            return 0.0f;
        case GroupOffsets::kHalf:
            return half_at(at + g.scale_bytes(), row);
        case GroupOffsets::kFloat:
            return float_at(at + g.scale_bytes(), row);
        case GroupOffsets::kZeros:
            return 0.0f - scale * static_cast<float>(small);
        default:
            return 0.0f - half_at(header + 32 * g.has_d(), row) * static_cast<float>(small);
    }
}

/// The product of one tile with one token.
void matmul_grouped_tile(const GroupProduct& p, int tile, const ActivationStrip* x, float* out) {
    const GroupLayout& g = p.layout;
    const uint8_t* header = p.weights + tile * g.tile_bytes();
    float scale[kTileRows] = {}, offset[kTileRows] = {};
    std::fill(out, out + kTileRows, 0.0f);
    for (int begin = 0; begin < g.columns; begin += kSpanColumns) {
        const int end = g.span_end(begin);
        const uint8_t* group = header + 32 * g.has_d() + 32 * g.has_dmin();
        const uint8_t* strip = header + g.header_bytes(begin, end);
        for (int k = begin; k < end; k += g.unit()) {
            if (k % g.group == 0) {
                for (int r = 0; r < kTileRows; ++r) {
                    scale[r] = grouped_scale(g, header, group, r);
                    offset[r] = grouped_offset(g, header, group, r, scale[r]);
                }
                group += g.scale_bytes() + g.offset_bytes();
            }
            const int first = k % kStripColumns, part = g.unit() == kStripColumns ? 2 : first / kGroupUnit;
            for (int r = 0; r < kTileRows; ++r) {
                int32_t sum = 0;
                for (int i = first; i < first + g.unit(); ++i) sum += grouped_number(p, strip, r, i) * x->codes[i];
                out[r] = std::fma(static_cast<float>(sum) * scale[r], x->scale, out[r]);
                if (g.offsets != GroupOffsets::kNone) out[r] = std::fma(offset[r], x->moments[part], out[r]);
            }
            if (first + g.unit() == kStripColumns) {
                strip += g.strip_blocks() * kBlockBytes;
                ++x;
            }
        }
        header = strip;
    }
}

void matmul_groups(const GroupProduct& p) {
    for (int t = 0; t < p.tokens; ++t)
        for (int tile = p.tile_begin; tile < p.tile_end; ++tile)
            matmul_grouped_tile(p, tile, p.x + t * p.x_stride,
                                p.out + t * p.out_stride + (tile - p.tile_begin) * kTileRows);
}

// --- Lines.

void multiply_rows(const LineProduct& p) {
    for (int t = 0; t < p.tokens; ++t) {
        for (int i = 0; i < p.count; ++i) {
            const uint8_t* w = p.weights + p.list[i] * p.stride;
            int32_t sum = -p.sums[t];
            for (int k = 0; k < p.lines * kLineEntries; ++k)
                sum +=
                    trit_of(w[k / kLineEntries * 64 + k % 64], k % kLineEntries / 64) * p.codes[t * p.code_stride + k];
            p.out[t * p.out_stride + i] = sum;
        }
    }
}

void add_columns(const LineProduct& p) {
    auto column = [&](int i) { return p.list ? p.list[i] : i; };
    for (int t = 0; t < p.tokens; ++t) {
        for (int r = 0; r < p.lines * kLineEntries; ++r) {
            int32_t sum = 0;
            for (int i = 0; i < p.count; ++i) {
                const uint8_t* line = p.weights + column(i) * p.stride + r / kLineEntries * 64;
                sum += (trit_of(line[column_byte(r % 64)], r % kLineEntries / 64) - 1) *
                       p.codes[t * p.code_stride + column(i)];
            }
            p.out[t * p.out_stride + r] = sum;
        }
    }
}

int list_above(const float* x, int n, float above, int first, int32_t* list) {
    int count = 0;
    for (int i = 0; i < n; ++i)
        if (x[i] > above) list[count++] = first + i;
    return count;
}

int list_nonzero(const int8_t* codes, int n, int32_t* list) {
    int count = 0;
    for (int i = 0; i < n; ++i)
        if (codes[i]) list[count++] = i;
    return count;
}

constexpr LineKernels kLines = {false, multiply_rows, add_columns, add_columns, list_above, list_nonzero};

bool supported() { return true; }

}  // namespace

extern const VectorKernels kScalarVectors;
extern const Kernels kScalar;
const Kernels kScalar = {
    "scalar",
    supported,
    false,
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

    quantize_groups,
    matmul_groups,

    &kLines,
};

}  // namespace tritkit

// The run-time layout of weights with a scale for every so many columns of a row: integers of 2 to 8 bits as planes,
// and codes that look up a table of 16 numbers. Plain data, as in kernels.h.
//
//   weight = scale * (code - zero) + offset
//
// A tile of 16 rows (kernels.h) is one stream of bytes, so that a thread reads memory in order: spans of 256 columns,
//   | d: 16 x float16 | dmin: 16 x float16 | groups that begin here: scale, offset; scale, offset; ... | to 64 bytes |
//   | columns 0..31: low plane, high plane | columns 32..63: low plane, high plane | ...                             |
// A part that a matrix does not have takes no bytes, the last span has only as many columns as are left, and columns
// are padded to a multiple of 32 with codes of weights that meet zero activations. A group may begin in one span and
// end in another. The planes are blocks of T16-1, T16-2, T16-4, T16-8: `bits` blocks of 64 bytes for 32 columns in all.
//
//   bits   2    3    4    5    6    8   table
//   low    2    2    4    4    4    8     4
//   high        1         1    2
#pragma once

#include <cstddef>
#include <cstdint>

namespace tritkit {

constexpr int kSpanColumns = 256;
constexpr int kStripColumns = 32;  // columns of activations that share a scale
constexpr int kGroupUnit = 16;     // groups of weights are multiples of this

/// kTable8: codes of 4 bits look up int8 numbers; kTable16: int16 numbers.
enum class GroupCodes { k2, k3, k4, k5, k6, k8, kTable8, kTable16 };

/// The scales of the 16 rows for a group.
enum class GroupScales {
    kHalf,       // float16
    kFloat,      // float32
    kTwoLevel,   // d * int8, d for a span
    kTwoLevel4,  // d * the low 4 bits of a byte; the high 4 bits belong to GroupOffsets::kMins
};

/// The offsets of the 16 rows for a group.
enum class GroupOffsets {
    kNone,   // zero
    kHalf,   // float16
    kFloat,  // float32
    kZeros,  // -(scale * uint8)
    kMins,   // -(dmin * uint8), dmin for a span
};

struct GroupLayout {
    GroupCodes codes;
    GroupScales scales;
    GroupOffsets offsets;
    int columns;  // a multiple of kStripColumns
    int group;    // columns that share a scale, a multiple of kGroupUnit

    /// Columns with one scale of the weights and one scale of the activations: what is summed as integers.
    int unit() const { return group % kStripColumns ? kGroupUnit : kStripColumns; }
    bool has_d() const { return scales >= GroupScales::kTwoLevel; }
    bool has_dmin() const { return offsets == GroupOffsets::kMins; }
    /// Bits of the low plane.
    int low_bits() const {
        constexpr int kBits[] = {2, 2, 4, 4, 4, 8, 4, 4};
        return kBits[static_cast<int>(codes)];
    }
    /// Blocks of 64 bytes that hold the codes of 32 columns: as many as a code has bits.
    int strip_blocks() const {
        constexpr int kBlocks[] = {2, 3, 4, 5, 6, 8, 4, 4};
        return kBlocks[static_cast<int>(codes)];
    }
    /// Bytes of the scales and offsets of one group.
    int scale_bytes() const {
        constexpr int kBytes[] = {32, 64, 16, 16};
        return kBytes[static_cast<int>(scales)];
    }
    int offset_bytes() const {
        constexpr int kBytes[] = {0, 32, 64, 16, 16};
        return scales == GroupScales::kTwoLevel4 ? 0 : kBytes[static_cast<int>(offsets)];
    }
    /// Bytes before the codes of the span of columns begin .. end - 1.
    int header_bytes(int begin, int end) const {
        const int groups = (end + group - 1) / group - (begin + group - 1) / group;
        const int bytes = 32 * has_d() + 32 * has_dmin() + groups * (scale_bytes() + offset_bytes());
        return (bytes + 63) / 64 * 64;
    }
    int span_end(int begin) const { return begin + kSpanColumns < columns ? begin + kSpanColumns : columns; }
    ptrdiff_t tile_bytes() const {
        ptrdiff_t bytes = static_cast<ptrdiff_t>(columns / kStripColumns) * strip_blocks() * 64;
        for (int begin = 0; begin < columns; begin += kSpanColumns) bytes += header_bytes(begin, span_end(begin));
        return bytes;
    }
};

/// 32 activations of a token: all that a product needs to know of them, in one cache line.
struct alignas(64) ActivationStrip {
    int8_t codes[kStripColumns];
    float scale;
    int32_t starts[4];  // minus the sum of the codes of the first 16 columns, of the others, of all; and zero
    float moments[3];   // scale * the sum of the codes of the same columns
};

/// What a strip holds besides its scale, from codes of which `count` mean something.
inline void set_codes(const int32_t (&codes)[kStripColumns], int count, ActivationStrip& strip) {
    for (int32_t& start : strip.starts) start = 0;
    for (int i = 0; i < kStripColumns; ++i) {
        strip.codes[i] = static_cast<int8_t>(i < count ? codes[i] : 0);
        strip.starts[i / kGroupUnit] -= strip.codes[i];
    }
    strip.starts[2] = strip.starts[0] + strip.starts[1];
    for (int i = 0; i < 3; ++i) strip.moments[i] = strip.scale * static_cast<float>(-strip.starts[i]);
}

/// Products of some tiles with some tokens: out[t][r - 16 * tile_begin] = sum over k of w[r][k] * x[t][k].
/// For the units u in order, all in float32 with one rounding for each line:
///   t = scale_u * float(sum over k of u of (code - bias) * x code)
///   sum = fma(t, x scale, sum)
///   sum = fma(offset_u, x moment of u, sum)     where there are offsets
struct GroupProduct {
    const uint8_t* weights;  // tile 0
    GroupLayout layout;
    int bias_bits;         // bias = 2^bias_bits; none: -1
    const uint8_t* table;  // kTable8: 16 numbers + bias; kTable16: 16 high bytes + bias, 16 low bytes
    int tile_begin, tile_end;
    const ActivationStrip* x;  // [tokens, x_stride], codes of zero beyond the last column
    ptrdiff_t x_stride;
    int tokens;
    float* out;  // [tokens, out_stride]
    ptrdiff_t out_stride;
    bool has_lowest = false;  // whether codes of activations may be -128
};

}  // namespace tritkit

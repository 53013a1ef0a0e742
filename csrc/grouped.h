// A matrix with a scale for every so many columns of a row: codes of 2 to 8 bits, or of 4 bits that look up a table.
#pragma once

#include "linear.h"

namespace tritkit {

/// Such a matrix one number at a time: what is re-ordered into the run-time layout (group_layout.h).
/// groups = ceil(columns / group), spans = ceil(columns / 256).
struct GroupedSource {
    int rows, columns;
    int bits;   // of a code, 2 .. 8
    int group;  // columns that share a scale: a multiple of 16, or at least all columns; a row's last may have fewer
    GroupScales scale_form;
    GroupOffsets offset_form;  // kNone and no table: a code stands for code - 2^(bits - 1)
    const uint8_t* codes;      // [rows, columns]
    const void* scales;        // [rows, groups]: float16, float or, times d, int8
    const uint16_t* d;         // [rows, spans], float16
    const void* offsets;       // [rows, groups]: float16, float or uint8
    const uint16_t* dmin;      // [rows, spans], float16
    const int16_t* table;      // null or [16]
};

class GroupedLinear : public Linear {
 public:
    /// y = scale * W x + bias; bias: null or [rows]. Throws std::invalid_argument.
    GroupedLinear(const GroupedSource& source, float scale, const float* bias, Pool& pool, Arena& arena,
                  const Kernels& kernels);

    /// What that will allocate at most. Throws std::invalid_argument.
    static int64_t needed_bytes(const GroupedSource& source);

    size_t bytes() const override { return weights_.size(); }
    std::string layout() const override;
    void reserve(int tokens, int threads, Scratch& scratch) const override;
    void apply(Range mine, const Activations& x, int tokens, float* out, ptrdiff_t out_stride, Write write,
               Scratch& scratch) const noexcept override;

 private:
    GroupLayout layout_;
    float scale_;
    int bias_bits_;
    uint8_t table_[32] = {};
    Bytes weights_;
    const Kernels* kernels_;
};

}  // namespace tritkit

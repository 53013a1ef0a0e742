// A matrix with a scale for every so many columns of a row: codes of 2 to 8 bits, or of 4 bits that look up a table.
#pragma once

#include "group_sources.h"
#include "linear.h"

namespace tritkit {

class GroupedLinear : public Linear {
 public:
    /// y = scale * W x + bias; bias: null or [rows]. x is rounded as a8_g32 says. Throws std::invalid_argument.
    GroupedLinear(const GroupSource& source, float scale, const float* bias, Pool& pool, Arena& arena,
                  const Kernels& kernels);

    /// Rounds x to this grid instead. row_sums: of scale * W, [rows]; null for symmetric grids. Throws
    /// std::invalid_argument.
    void round_inputs(const InputGrid& grid, const float* row_sums);

    /// What that will allocate at most.
    static int64_t needed_bytes(int rows, const GroupLayout& layout);

    size_t bytes() const override { return weights_.size() + row_sums_.size() * sizeof(float); }
    std::string layout() const override { return name_; }
    void reserve(int tokens, int threads, Scratch& scratch) const override;
    void apply(Range mine, const Activations& x, int tokens, float* out, ptrdiff_t out_stride, Write write,
               Scratch& scratch) const noexcept override;

 private:
    GroupLayout layout_;
    float scale_;
    int bias_bits_;
    uint8_t table_[32] = {};
    std::string name_;
    Bytes weights_;
    std::vector<float> row_sums_;  // of asymmetric grids
    const Kernels* kernels_;
};

}  // namespace tritkit

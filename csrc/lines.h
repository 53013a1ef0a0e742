// Ternary matrices whose rows or columns lie by themselves in lines (line_table.h), so that those that are not needed
// are not read either. With nothing left out they are linears like others.
#pragma once

#include <string>

#include "linear.h"

namespace tritkit {

/// The rows of the matrix in lines, or the columns; whole vectors, one behind the other. scale: of the matrix, as in
/// repack(). Throws std::invalid_argument.
Bytes repack_lines(const Stored& source, bool by_columns, float scale, Pool& pool, Arena& arena);

class LineLinear : public Linear {
 public:
    size_t bytes() const override { return weights_.size(); }
    std::string layout() const override { return "l64_3"; }
    /// What a row or a column takes.
    size_t vector_bytes() const { return static_cast<size_t>(stride_); }

 protected:
    LineLinear(const Stored& source, bool by_columns, float scale, const std::string& activations, const float* bias,
               Pool& pool, Arena& arena, const Kernels& kernels);
    LineProduct product(const Activations& x, int tokens, int32_t* out, ptrdiff_t out_stride) const;

    float scale_;
    int lines_;  // of a vector
    ptrdiff_t stride_;
    Bytes weights_;
    const LineKernels* kernels_;
};

/// Rows in lines: some of the outputs need not be computed.
class RowLinear : public LineLinear {
 public:
    /// bias: null or [rows].
    RowLinear(const Stored& source, float scale, const std::string& activations, const float* bias, Pool& pool,
              Arena& arena, const Kernels& kernels);

    void reserve(int tokens, int threads, Scratch& scratch) const override;
    void apply(Range mine, const Activations& x, int tokens, float* out, ptrdiff_t out_stride, Write write,
               Scratch& scratch) const noexcept override;

    /// out[t][r] = this(x[t])[r] for the rows of an ascending list. tokens: at most kLineTokens.
    void apply_listed(const int32_t* list, int count, const Activations& x, int tokens, float* out,
                      ptrdiff_t out_stride, Scratch& scratch) const noexcept;

 private:
    std::vector<int32_t> all_;  // 0 ... rows - 1
};

/// Columns in lines: some of the inputs need not be multiplied.
class ColumnLinear : public LineLinear {
 public:
    ColumnLinear(const Stored& source, float scale, const std::string& activations, const float* bias, Pool& pool,
                 Arena& arena, const Kernels& kernels);

    int rows_together() const override { return kLineEntries; }
    void reserve(int tokens, int threads, Scratch& scratch) const override;
    void apply(Range mine, const Activations& x, int tokens, float* out, ptrdiff_t out_stride, Write write,
               Scratch& scratch) const noexcept override;

    /// Integer sums over the columns of an ascending list, for all rows: [tokens, sums_stride]. What other columns add
    /// is exact too, so several threads may share the columns, and their sums the rows. tokens: at most kLineTokens.
    void sums_listed(const int32_t* list, int count, const Activations& x, int tokens, int32_t* sums,
                     Scratch& scratch) const noexcept;
    ptrdiff_t sums_stride() const { return ptrdiff_t{lines_} * kLineEntries; }
    /// out[t][r] += this(x[t])[r] for the rows of `mine`, from the sums of `parts` threads, each `spacing` behind the
    /// one before; the first of them become their total.
    void add_sums(Range mine, int32_t* sums, int parts, ptrdiff_t spacing, const Activations& x, int tokens, float* out,
                  ptrdiff_t out_stride) const noexcept;
};

}  // namespace tritkit

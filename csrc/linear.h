// One matrix of the model: run-time bytes, scale, activation format and bias, all of it data.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "repack.h"
#include "threads.h"

namespace tritkit {

/// What becomes of the input before the product. kFloat: nothing; the others: int8 codes per token.
enum class ActivationFormat { kFloat = -1, kA8 = 0, kA8Q128 = 1 };
constexpr int kIntegerFormats = 2;

/// "a8", "a8_q128", or "" for float. Throws std::invalid_argument.
ActivationFormat activation_format(const std::string& name);

/// The inputs of one or several linears: rows of floats, and their int8 codes in the formats that were asked for.
class Activations {
 public:
    Activations() = default;
    Activations(int tokens, int columns);

    float* row(int token) const { return x_.data() + token * stride_; }
    const float* rows() const { return x_.data(); }
    ptrdiff_t stride() const { return stride_; }
    int columns() const { return columns_; }

    struct Codes {
        AlignedArray<int8_t> codes;  // [tokens, code_stride]
        AlignedArray<float> scales;  // [tokens]
        AlignedArray<int32_t> sums;  // [tokens]
    };
    const Codes& codes(ActivationFormat format) const { return codes_[static_cast<int>(format)]; }
    ptrdiff_t code_stride() const { return code_stride_; }

    /// Allocates what quantize() will fill; not inside a parallel region.
    void reserve(ActivationFormat format);
    /// Codes of one token, in every format that was reserved.
    void quantize(int token, const Kernels& kernels) const;

 private:
    int tokens_ = 0, columns_ = 0;
    ptrdiff_t stride_ = 0, code_stride_ = 0;
    AlignedArray<float> x_;  // [tokens, stride], zero beyond the last column
    std::array<Codes, kIntegerFormats> codes_;
};

class Linear {
 public:
    /// bias: null or [rows]. Floats are read where they lie if they can be. Throws std::invalid_argument.
    Linear(const Stored& source, float scale, const std::string& activations, const float* bias, Pool& pool,
           Arena& arena, const Kernels& kernels);

    /// What that will allocate.
    static int64_t needed_bytes(const Stored& source, const Kernels& kernels);

    int rows() const { return rows_; }
    int columns() const { return columns_; }
    Runtime runtime() const { return runtime_; }
    ActivationFormat activations() const { return activations_; }
    size_t bytes() const { return weights_.size(); }

    /// The rows that this thread computes: whole tiles.
    Range share(const Team& team) const { return team.share(rows_, kTileRows); }

    enum class Write { kStore, kAdd };
    /// Sums that wait for their scale; one for each thread.
    struct Scratch {
        std::vector<int32_t> integers;
        std::vector<float> floats;
        AlignedArray<uint8_t> panel;
    };
    /// Makes room for apply() with up to `tokens` tokens on one of `threads` threads; not inside a parallel region.
    void reserve(int tokens, int threads, Scratch& scratch) const;
    /// out[t][r] = (or +=) this(x[t])[r] for the rows of `mine`. `scratch` was reserved.
    void apply(Range mine, const Activations& x, int tokens, float* out, ptrdiff_t out_stride, Write write,
               Scratch& scratch) const noexcept;

    /// The bare sums of the integer product, [tokens, round_up(rows, 16)].
    void integer_product(Range mine, const int8_t* codes, ptrdiff_t code_stride, const int32_t* sums, int tokens,
                         int32_t* out, ptrdiff_t out_stride, uint8_t* panel) const;

 private:
    void float_product(Range mine, const float* x, ptrdiff_t x_stride, int tokens, float* out,
                       ptrdiff_t out_stride) const;

    Runtime runtime_;
    int rows_, columns_;
    float scale_;
    ActivationFormat activations_;
    std::vector<float> bias_;
    Bytes weights_;
    const Kernels* kernels_;
};

}  // namespace tritkit

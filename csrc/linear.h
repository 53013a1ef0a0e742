// One matrix of the model: run-time bytes, scale, activation format and bias, all of it data.
#pragma once

#include <algorithm>
#include <array>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "input_grid.h"
#include "kernels.h"
#include "memory.h"
#include "repack.h"
#include "row_integers.h"
#include "threads.h"

namespace tritkit {

/// What becomes of the input before the product. kFloat: nothing; kA8, kA8Q128: int8 codes per token. kA16: codes of 16
/// bits per token, 256 * high + low, as two rows of int8 that go through the same products. kA8G32: int8 codes per 32
/// columns of a token. kGrid: what the linear's InputGrid says.
enum class ActivationFormat { kFloat = -1, kA8 = 0, kA8Q128 = 1, kA16 = 2, kA8G32 = 3, kGrid = 4 };
constexpr int kIntegerFormats = 3;  // with one scale for a token
constexpr int code_rows(ActivationFormat format) { return format == ActivationFormat::kA16 ? 2 : 1; }

/// "a8", "a8_q128", "a8_g32", or "" for float. Throws std::invalid_argument.
ActivationFormat activation_format(const std::string& name);
/// The same for a matrix whose products are sums of integers over whole rows; not every format fits one.
ActivationFormat integer_format(const Stored& source, const std::string& name);

class Linear;
constexpr int kMostReaders = 3;  // linears that read the same input: q, k and v

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
        AlignedArray<int8_t> codes;  // [tokens * code_rows, code_stride]
        AlignedArray<float> scales;  // [tokens]
        AlignedArray<int32_t> sums;  // [tokens * code_rows], of each row's codes
    };
    const Codes& codes(ActivationFormat format) const { return codes_[static_cast<int>(format)]; }
    ptrdiff_t code_stride() const { return code_stride_; }
    /// kA8G32, and kGrid: of the linears with this place.
    const ActivationStrip* strips() const { return strips_.data(); }
    const ActivationStrip* strips(int place) const { return grids_[static_cast<size_t>(place)].strips.data(); }
    /// What quantize_inputs() returned for each token.
    const float* shifts(int place) const { return grids_[static_cast<size_t>(place)].shifts.data(); }
    ptrdiff_t strip_stride() const { return (columns_ + kStripColumns - 1) / kStripColumns; }

    /// Allocates what quantize() will fill; not inside a parallel region.
    void reserve(ActivationFormat format);
    void reserve(const Linear& reader);
    /// Codes of one token, in every format that was reserved, and on the grids of these linears. No reader: null.
    void quantize(int token, const Kernels& kernels, std::initializer_list<const Linear*> readers) const;

 private:
    int tokens_ = 0, columns_ = 0;
    ptrdiff_t stride_ = 0, code_stride_ = 0;
    AlignedArray<float> x_;  // [tokens, stride], zero beyond the last column
    std::array<Codes, kIntegerFormats> codes_;
    AlignedArray<ActivationStrip> strips_;  // [tokens, strip_stride]
    struct Grid {
        AlignedArray<ActivationStrip> strips;
        AlignedArray<float> shifts;  // [tokens]
    };
    std::array<Grid, kMostReaders> grids_;
};

// The sums of this many rows wait in cache for their scale. One token has few, so all its rows go in one stream.
constexpr int kPanelRows = kLineEntries;
constexpr int kFewTokens = 4;
constexpr int kRowsTogether = 4 * kTileRows;                          // tiles for four streams
constexpr int kMostTogether = std::max(kRowsTogether, kLineEntries);  // that anybody deals out together

/// A matrix of the model, y = W x + bias, in one of its forms.
class Linear {
 public:
    virtual ~Linear() = default;

    int rows() const { return rows_; }
    int columns() const { return columns_; }
    ActivationFormat activations() const { return activations_; }
    /// kGrid: the grid, and where in Activations its codes are. Linears with one place have one grid.
    const InputGrid& grid() const { return grid_; }
    int place() const { return place_; }
    void set_place(int place) { place_ = place; }
    /// What one product with one token reads.
    virtual size_t bytes() const = 0;
    /// What the kernels read: "t16_3", "bf16", ...
    virtual std::string layout() const = 0;

    /// So many rows are dealt out to threads together.
    virtual int rows_together() const { return kRowsTogether; }

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
    virtual void reserve(int tokens, int threads, Scratch& scratch) const = 0;
    /// out[t][r] = (or +=) this(x[t])[r] for the rows of `mine`. `scratch` was reserved.
    virtual void apply(Range mine, const Activations& x, int tokens, float* out, ptrdiff_t out_stride, Write write,
                       Scratch& scratch) const noexcept = 0;

 protected:
    Linear(int rows, int columns, ActivationFormat activations, const float* bias);
    /// How many sums wait at the same time.
    ptrdiff_t waiting_sums(int tokens, int threads) const;
    /// Cuts `mine` into panels: product(rows, stride) makes the sums of a panel; then
    /// out[t][r] = sum(t, r, stride) * scale(t) * row_scales[r] + bias[r], where r counts from the panel's first row.
    template <class Product, class Sum, class Scale>
    void by_panels(Range mine, int tokens, float* out, ptrdiff_t out_stride, Write write, const float* row_scales,
                   Product product, Sum sum, Scale scale) const noexcept;

    int rows_, columns_;
    ActivationFormat activations_;
    InputGrid grid_{};
    int place_ = 0;
    std::vector<float> bias_;
};

using LinearPtr = std::shared_ptr<const Linear>;

/// Codes of 1 to 8 bits with one scale for the matrix or one for each row: exact integer sums, then the scales.
class TileLinear : public Linear {
 public:
    /// Ternary or binary weights in the layout `runtime`; bias: null or [rows]. Throws std::invalid_argument.
    TileLinear(const Stored& source, Runtime runtime, float scale, const std::string& activations, const float* bias,
               Pool& pool, Arena& arena, const Kernels& kernels);
    TileLinear(RowIntegers codes, const Kernels& kernels);

    size_t bytes() const override;
    std::string layout() const override;
    void reserve(int tokens, int threads, Scratch& scratch) const override;
    void apply(Range mine, const Activations& x, int tokens, float* out, ptrdiff_t out_stride, Write write,
               Scratch& scratch) const noexcept override;

    /// The bare sums of the integer product, [tokens, out_stride]. out_stride: at least the rows of all tiles of mine.
    void integer_product(Range mine, const int8_t* codes, ptrdiff_t code_stride, const int32_t* sums, int tokens,
                         int32_t* out, ptrdiff_t out_stride, uint8_t* panel) const;

 private:
    std::vector<Plane> planes_;
    int offset_;
    float scale_ = 1.0f;
    std::vector<float> row_scales_;  // empty: none
    const Kernels* kernels_;
};

/// Floats of 32 or 16 bits.
class FloatLinear : public Linear {
 public:
    /// Rows are read where they lie if they can be. Throws std::invalid_argument.
    FloatLinear(const Stored& source, float scale, const float* bias, Pool& pool, Arena& arena, const Kernels& kernels);

    size_t bytes() const override { return weights_.size(); }
    std::string layout() const override;
    void reserve(int tokens, int threads, Scratch& scratch) const override;
    void apply(Range mine, const Activations& x, int tokens, float* out, ptrdiff_t out_stride, Write write,
               Scratch& scratch) const noexcept override;

    /// What apply() gives for this row; x as in Activations::row.
    float row_product(int r, const float* x) const;

 private:
    void float_product(Range mine, const float* x, ptrdiff_t x_stride, int tokens, float* out,
                       ptrdiff_t out_stride) const;

    Runtime runtime_;
    float scale_;
    Bytes weights_;
    const Kernels* kernels_;
};

/// Which part of a product may turn out not to be needed: outputs that are multiplied by zero, inputs that are zero.
enum class Skip { kNothing, kOutputs, kInputs };
/// Whether matrices of which something may be skipped go into lines (lines.h): where these are about full, or always.
enum class Lines { kNever, kWhereFull, kAlways };

/// Where ternary codes go.
struct TernaryLayout {
    Runtime tiles = Runtime::kTernary;
    Lines lines = Lines::kNever;
};

/// Where linears that read the same input find their codes: those with equal grids at the same place.
void share_places(std::initializer_list<Linear*> readers);

/// The form that fits the source. Throws std::invalid_argument.
std::shared_ptr<Linear> make_linear(const Stored& source, TernaryLayout ternary, Skip skip, float scale,
                                    const std::string& activations, const float* bias, Pool& pool, Arena& arena,
                                    const Kernels& kernels);

/// What that will allocate.
int64_t needed_bytes(const Stored& source, TernaryLayout ternary, Skip skip, const std::string& activations);

template <class Product, class Sum, class Scale>
void Linear::by_panels(Range mine, int tokens, float* out, ptrdiff_t out_stride, Write write, const float* row_scales,
                       Product product, Sum sum, Scale scale) const noexcept {
    const int panel = tokens <= kFewTokens ? std::max(mine.end - mine.begin, 1) : kPanelRows;
    const ptrdiff_t stride = round_up(panel, kTileRows);
    const float* bias = bias_.empty() ? nullptr : bias_.data();
    for (int begin = mine.begin; begin < mine.end; begin += panel) {
        const Range rows{begin, std::min(begin + panel, mine.end)};
        product(rows, stride);
        for (int t = 0; t < tokens; ++t) {
            float* y = out + t * out_stride;
            const float of_token = scale(t);
            for (int r = rows.begin; r < rows.end; ++r) {
                const float factor = row_scales ? of_token * row_scales[r] : of_token;
                const float value = sum(t, r - rows.begin, stride) * factor + (bias ? bias[r] : 0.0f);
                y[r] = write == Write::kAdd ? y[r] + value : value;
            }
        }
    }
}

}  // namespace tritkit

#include "linear.h"

#include <algorithm>
#include <cassert>
#include <stdexcept>

namespace tritkit {
namespace {

// The sums of this many rows wait in cache for their scale. One token has few, so all its rows go in one stream.
constexpr int kPanelRows = 256;
constexpr int kFewTokens = 4;

// 127 makes every code reachable by its own sign; 128 is the original BitNet's Qb.
constexpr float kLevels[kIntegerFormats] = {127.0f, 128.0f};

}  // namespace

ActivationFormat activation_format(const std::string& name) {
    if (name.empty()) return ActivationFormat::kFloat;
    if (name == "a8") return ActivationFormat::kA8;
    if (name == "a8_q128") return ActivationFormat::kA8Q128;
    throw std::invalid_argument("activations is '" + name + "', expected a8, a8_q128 or None");
}

Activations::Activations(int tokens, int columns)
    : tokens_(tokens),
      columns_(columns),
      stride_(round_up(columns, kFloatPad)),
      code_stride_(tritkit::code_stride(columns)),
      x_(static_cast<size_t>(tokens * stride_)) {}

void Activations::reserve(ActivationFormat format) {
    if (format == ActivationFormat::kFloat) return;
    Codes& c = codes_[static_cast<int>(format)];
    if (c.scales.size()) return;
    c.codes = AlignedArray<int8_t>(static_cast<size_t>(tokens_ * code_stride_));
    c.scales = AlignedArray<float>(static_cast<size_t>(tokens_));
    c.sums = AlignedArray<int32_t>(static_cast<size_t>(tokens_));
}

void Activations::quantize(int token, const Kernels& kernels) const {
    for (int format = 0; format < kIntegerFormats; ++format) {
        const Codes& c = codes_[format];
        if (!c.scales.size()) continue;
        int8_t* codes = c.codes.data() + token * code_stride_;
        c.scales[token] = kernels.quantize_row(row(token), columns_, kLevels[format], codes, &c.sums[token]);
    }
}

Linear::Linear(const Stored& source, float scale, const std::string& activations, const float* bias, Pool& pool,
               Arena& arena, const Kernels& kernels)
    : runtime_(source.layout.runtime),
      rows_(source.rows),
      columns_(source.columns),
      scale_(scale),
      activations_(activation_format(activations)),
      kernels_(&kernels) {
    if (is_float(runtime_) != (activations_ == ActivationFormat::kFloat))
        throw std::invalid_argument("activations is '" + activations + "' for layout " + source.layout.name +
                                    ", expected " + (is_float(runtime_) ? "None" : "a8 or a8_q128"));
    if (!is_float(runtime_) && columns_ > kMaxColumns)
        throw std::invalid_argument("there are " + std::to_string(columns_) + " columns, more than the " +
                                    std::to_string(kMaxColumns) + " whose products are sure to fit 32 bits");
    if (bias) bias_.assign(bias, bias + rows_);
    weights_ = runs_in_place(source.layout, source.bytes.data(), columns_) ? source.bytes
                                                                           : repack(source, runtime_, pool, arena);
}

int64_t Linear::needed_bytes(const Stored& source, const Kernels&) {
    if (runs_in_place(source.layout, source.bytes.data(), source.columns)) return 0;
    const int64_t tiles = (source.rows + kTileRows - 1) / kTileRows;
    return tiles * tile_bytes(source.layout.runtime, source.columns);
}

void Linear::integer_product(Range mine, const int8_t* codes, ptrdiff_t code_stride, const int32_t* sums, int tokens,
                             int32_t* out, ptrdiff_t out_stride, uint8_t* panel) const {
    const bool ternary = runtime_ == Runtime::kTernary;
    const TileLayout layout = ternary ? TileLayout::kT16_2 : TileLayout::kT16_1;
    const TileProduct product{weights_.data(),
                              blocks_of(layout, columns_),
                              mine.begin / kTileRows,
                              (mine.end + kTileRows - 1) / kTileRows,
                              codes,
                              code_stride,
                              sums,
                              tokens,
                              out,
                              out_stride,
                              ternary ? 0 : 1,
                              1,
                              false,
                              panel};
    kernels_->matmul_tiles[static_cast<int>(layout)](product);
}

void Linear::float_product(Range mine, const float* x, ptrdiff_t x_stride, int tokens, float* out,
                           ptrdiff_t out_stride) const {
    const ptrdiff_t row_stride = round_up(columns_, kFloatPad);
    const FloatProduct product{
        weights_.data(), row_stride, static_cast<int>(row_stride), mine.begin, mine.end, x, x_stride, tokens, out,
        out_stride};
    (runtime_ == Runtime::kF32   ? kernels_->matmul_f32
     : runtime_ == Runtime::kF16 ? kernels_->matmul_f16
                                 : kernels_->matmul_bf16)(product);
}

void Linear::reserve(int tokens, int threads, Scratch& scratch) const {
    const ptrdiff_t tiles = (rows_ + kTileRows - 1) / kTileRows;
    const ptrdiff_t largest_share = (tiles + threads - 1) / threads * kTileRows;
    ptrdiff_t size = std::min(tokens, kFewTokens) * largest_share;
    if (tokens > kFewTokens) size = std::max(size, static_cast<ptrdiff_t>(tokens) * kPanelRows);
    auto grow = [&](auto& sums) { sums.resize(std::max(sums.size(), static_cast<size_t>(size))); };
    if (is_float(runtime_)) {
        grow(scratch.floats);
        return;
    }
    grow(scratch.integers);
    const size_t panel = static_cast<size_t>(kPanelTiles * kTileRows * tritkit::code_stride(columns_));
    if (tokens > 1 && scratch.panel.size() < panel) scratch.panel = AlignedArray<uint8_t>(panel, false);
}

void Linear::apply(Range mine, const Activations& x, int tokens, float* out, ptrdiff_t out_stride, Write write,
                   Scratch& scratch) const noexcept {
    const int panel = tokens <= kFewTokens ? std::max(mine.end - mine.begin, 1) : kPanelRows;
    const ptrdiff_t stride = round_up(panel, kTileRows);
    assert((is_float(runtime_) ? scratch.floats.size() : scratch.integers.size()) >=
           static_cast<size_t>(mine.empty() ? 0 : tokens * stride));
    const float* bias = bias_.empty() ? nullptr : bias_.data();
    Range rows;

    auto finish = [&](int t, const auto* sums, float scale) {
        float* y = out + t * out_stride;
        for (int r = rows.begin; r < rows.end; ++r) {
            const float value = static_cast<float>(sums[r - rows.begin]) * scale + (bias ? bias[r] : 0.0f);
            y[r] = write == Write::kAdd ? y[r] + value : value;
        }
    };
    for (int begin = mine.begin; begin < mine.end; begin += panel) {
        rows = {begin, std::min(begin + panel, mine.end)};
        if (is_float(runtime_)) {
            float_product(rows, x.rows(), x.stride(), tokens, scratch.floats.data(), stride);
            for (int t = 0; t < tokens; ++t) finish(t, scratch.floats.data() + t * stride, scale_);
        } else {
            const Activations::Codes& c = x.codes(activations_);
            integer_product(rows, c.codes.data(), x.code_stride(), c.sums.data(), tokens, scratch.integers.data(),
                            stride, scratch.panel.data());
            for (int t = 0; t < tokens; ++t) finish(t, scratch.integers.data() + t * stride, scale_ * c.scales[t]);
        }
    }
}

}  // namespace tritkit

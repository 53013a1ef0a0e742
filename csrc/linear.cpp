#include "linear.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "floats.h"

namespace tritkit {
namespace {

// 127 makes every code reachable by its own sign; 128 is the original BitNet's Qb.
constexpr float kLevels[] = {127.0f, 128.0f};

/// c = round(x * inverse), inverse = 127 * 256 / absmax, as 256 * high + low.
float quantize_row16(const float* x, int columns, int8_t* high, int8_t* low, int32_t* sums) {
    float absmax = 0.0f;
    for (int k = 0; k < columns; ++k) absmax = std::fabs(x[k]) > absmax ? std::fabs(x[k]) : absmax;
    const float inverse = 127.0f * 256.0f / std::max(absmax, 1e-5f);
    int32_t high_sum = 0, low_sum = 0;
    for (int k = 0; k < columns; ++k) {
        float value = x[k] * inverse;
        value = value > -32512.0f ? value : -32512.0f;  // not a number goes here too
        const int code = round_to_int(value < 32512.0f ? value : 32512.0f), top = (code + 128) >> 8;
        high[k] = static_cast<int8_t>(top);
        low[k] = static_cast<int8_t>(code - 256 * top);
        high_sum += top;
        low_sum += code - 256 * top;
    }
    sums[0] = high_sum;
    sums[1] = low_sum;
    return 1.0f / inverse;
}

}  // namespace

ActivationFormat activation_format(const std::string& name) {
    if (name.empty()) return ActivationFormat::kFloat;
    if (name == "a8") return ActivationFormat::kA8;
    if (name == "a8_q128") return ActivationFormat::kA8Q128;
    if (name == "a8_g32") return ActivationFormat::kA8G32;
    throw std::invalid_argument("activations is '" + name + "', expected a8, a8_q128, a8_g32 or None");
}

ActivationFormat integer_format(const Stored& source, const std::string& name) {
    const ActivationFormat format = activation_format(name);
    if (format != ActivationFormat::kA8 && format != ActivationFormat::kA8Q128)
        throw std::invalid_argument("activations is " + (name.empty() ? "None" : "'" + name + "'") + " for layout " +
                                    source.layout.name + ", expected a8 or a8_q128");
    if (source.columns > kMaxColumns)
        throw std::invalid_argument("there are " + std::to_string(source.columns) + " columns, more than the " +
                                    std::to_string(kMaxColumns) + " whose products are sure to fit 32 bits");
    return format;
}

Activations::Activations(int tokens, int columns)
    : tokens_(tokens),
      columns_(columns),
      stride_(round_up(columns, kFloatPad)),
      code_stride_(tritkit::code_stride(columns)),
      x_(static_cast<size_t>(tokens * stride_)) {}

void Activations::reserve(ActivationFormat format) {
    if (format == ActivationFormat::kFloat) return;
    if (format == ActivationFormat::kA8G32) {
        if (!strips_.size()) strips_ = AlignedArray<ActivationStrip>(static_cast<size_t>(tokens_ * strip_stride()));
        return;
    }
    Codes& c = codes_[static_cast<int>(format)];
    if (c.scales.size()) return;
    const int rows = tokens_ * code_rows(format);
    c.codes = AlignedArray<int8_t>(static_cast<size_t>(rows * code_stride_));
    c.scales = AlignedArray<float>(static_cast<size_t>(tokens_));
    c.sums = AlignedArray<int32_t>(static_cast<size_t>(rows));
}

void Activations::reserve(const Linear& reader) {
    if (reader.activations() != ActivationFormat::kGrid) return reserve(reader.activations());
    Grid& g = grids_[static_cast<size_t>(reader.place())];
    if (g.shifts.size()) return;
    g.strips = AlignedArray<ActivationStrip>(static_cast<size_t>(tokens_ * strip_stride()));
    g.shifts = AlignedArray<float>(static_cast<size_t>(tokens_));
}

void Activations::quantize(int token, const Kernels& kernels, std::initializer_list<const Linear*> readers) const {
    for (ActivationFormat format : {ActivationFormat::kA8, ActivationFormat::kA8Q128, ActivationFormat::kA16}) {
        const Codes& c = codes(format);
        if (!c.scales.size()) continue;
        const int first = token * code_rows(format);
        int8_t* to = c.codes.data() + first * code_stride_;
        c.scales[token] =
            format == ActivationFormat::kA16
                ? quantize_row16(row(token), columns_, to, to + code_stride_, &c.sums[first])
                : kernels.quantize_row(row(token), columns_, kLevels[static_cast<int>(format)], to, &c.sums[first]);
    }
    if (strips_.size()) kernels.quantize_groups(row(token), columns_, strips_.data() + token * strip_stride());
    unsigned done = 0;
    for (const Linear* reader : readers) {
        if (!reader || reader->activations() != ActivationFormat::kGrid || done >> reader->place() & 1) continue;
        done |= 1u << reader->place();
        const Grid& g = grids_[static_cast<size_t>(reader->place())];
        g.shifts[token] =
            quantize_inputs(reader->grid(), row(token), columns_, g.strips.data() + token * strip_stride());
    }
}

void share_places(std::initializer_list<Linear*> readers) {
    int places = 0;
    for (auto reader = readers.begin(); reader != readers.end(); ++reader) {
        if ((*reader)->activations() != ActivationFormat::kGrid) continue;
        const auto same = std::find_if(readers.begin(), reader, [&](const Linear* other) {
            return other->activations() == ActivationFormat::kGrid && other->grid() == (*reader)->grid();
        });
        (*reader)->set_place(same == reader ? places++ : (*same)->place());
    }
}

Linear::Linear(int rows, int columns, ActivationFormat activations, const float* bias)
    : rows_(rows), columns_(columns), activations_(activations) {
    if (bias) bias_.assign(bias, bias + rows);
}

ptrdiff_t Linear::waiting_sums(int tokens, int threads) const {
    const ptrdiff_t tiles = (rows_ + kTileRows - 1) / kTileRows;
    const ptrdiff_t largest_share = (tiles + threads - 1) / threads * kTileRows;
    const ptrdiff_t largest = std::max<ptrdiff_t>(largest_share, largest_chunk(rows_, threads, kMostTogether));
    const ptrdiff_t size = std::min(tokens, kFewTokens) * std::min(largest, tiles * kTileRows);
    return tokens > kFewTokens ? std::max(size, static_cast<ptrdiff_t>(tokens) * kPanelRows) : size;
}

TileLinear::TileLinear(const Stored& source, Runtime runtime, float scale, const std::string& activations,
                       const float* bias, Pool& pool, Arena& arena, const Kernels& kernels)
    : Linear(source.rows, source.columns, integer_format(source, activations), bias),
      offset_(1),  // ternary: code - 1; binary: 2 * code - 1
      scale_(scale),
      kernels_(&kernels) {
    planes_.push_back(
        {tile_layout(runtime), runtime == Runtime::kBinary ? 1 : 0, repack(source, runtime, scale, pool, arena)});
}

TileLinear::TileLinear(RowIntegers codes, const Kernels& kernels)
    : Linear(codes.rows, codes.columns, ActivationFormat::kA16, nullptr),
      planes_(std::move(codes.planes)),
      offset_(codes.offset),
      row_scales_(std::move(codes.scales)),
      kernels_(&kernels) {}

size_t TileLinear::bytes() const {
    size_t bytes = row_scales_.size() * sizeof(float);
    for (const Plane& plane : planes_) bytes += plane.tiles.size();
    return bytes;
}

std::string TileLinear::layout() const {
    std::string name;
    for (const Plane& plane : planes_) name += (name.empty() ? "" : "+") + std::string(facts(plane.layout).name);
    return name;
}

void TileLinear::integer_product(Range mine, const int8_t* codes, ptrdiff_t code_stride, const int32_t* sums,
                                 int tokens, int32_t* out, ptrdiff_t out_stride, uint8_t* panel) const {
    for (const Plane& plane : planes_) {
        const bool first = &plane == planes_.data();
        const TileProduct product{plane.tiles.data(),
                                  blocks_of(plane.layout, columns_),
                                  mine.begin / kTileRows,
                                  (mine.end + kTileRows - 1) / kTileRows,
                                  codes,
                                  code_stride,
                                  sums,
                                  tokens,
                                  out,
                                  out_stride,
                                  plane.shift,
                                  first ? offset_ : 0,
                                  !first,
                                  panel};
        kernels_->matmul_tiles[static_cast<int>(plane.layout)](product);
    }
}

void TileLinear::reserve(int tokens, int threads, Scratch& scratch) const {
    const size_t sums = static_cast<size_t>(waiting_sums(tokens, threads) * code_rows(activations_));
    if (scratch.integers.size() < sums) scratch.integers.resize(sums);
    const size_t panel = static_cast<size_t>(kPanelTiles * kTileRows * tritkit::code_stride(columns_));
    if (tokens * code_rows(activations_) > 1 && scratch.panel.size() < panel)
        scratch.panel = AlignedArray<uint8_t>(panel, false);
}

void TileLinear::apply(Range mine, const Activations& x, int tokens, float* out, ptrdiff_t out_stride, Write write,
                       Scratch& scratch) const noexcept {
    const Activations::Codes& c = x.codes(activations_);
    const int32_t* sums = scratch.integers.data();
    const float* row_scales = row_scales_.empty() ? nullptr : row_scales_.data();
    auto product = [&](Range rows, ptrdiff_t stride) {
        integer_product(rows, c.codes.data(), x.code_stride(), c.sums.data(), tokens * code_rows(activations_),
                        scratch.integers.data(), stride, scratch.panel.data());
    };
    auto scale = [&](int t) { return scale_ * c.scales[t]; };
    if (activations_ == ActivationFormat::kA16)
        by_panels(
            mine, tokens, out, out_stride, write, row_scales, product,
            [=](int t, int r, ptrdiff_t stride) {
                const int32_t* high = sums + 2 * t * stride + r;
                return 256.0f * static_cast<float>(high[0]) + static_cast<float>(high[stride]);
            },
            scale);
    else
        by_panels(
            mine, tokens, out, out_stride, write, row_scales, product,
            [=](int t, int r, ptrdiff_t stride) { return static_cast<float>(sums[t * stride + r]); }, scale);
}

FloatLinear::FloatLinear(const Stored& source, float scale, const float* bias, Pool& pool, Arena& arena,
                         const Kernels& kernels)
    : Linear(source.rows, source.columns, ActivationFormat::kFloat, bias),
      runtime_(source.layout.runtime),
      scale_(scale),
      weights_(runs_in_place(source.layout, source.bytes.data(), source.columns)
                   ? source.bytes
                   : repack(source, source.layout.runtime, 1.0f, pool, arena)),
      kernels_(&kernels) {}

std::string FloatLinear::layout() const {
    return runtime_ == Runtime::kF32 ? "f32" : runtime_ == Runtime::kF16 ? "f16" : "bf16";
}

void FloatLinear::float_product(Range mine, const float* x, ptrdiff_t x_stride, int tokens, float* out,
                                ptrdiff_t out_stride) const {
    const ptrdiff_t row_stride = round_up(columns_, kFloatPad);
    const FloatProduct product{
        weights_.data(), row_stride, static_cast<int>(row_stride), mine.begin, mine.end, x, x_stride, tokens, out,
        out_stride};
    (runtime_ == Runtime::kF32   ? kernels_->matmul_f32
     : runtime_ == Runtime::kF16 ? kernels_->matmul_f16
                                 : kernels_->matmul_bf16)(product);
}

float FloatLinear::row_product(int r, const float* x) const {
    float sum;
    float_product({r, r + 1}, x, 0, 1, &sum, 1);
    return sum * scale_ + (bias_.empty() ? 0.0f : bias_[static_cast<size_t>(r)]);
}

void FloatLinear::reserve(int tokens, int threads, Scratch& scratch) const {
    const size_t sums = static_cast<size_t>(waiting_sums(tokens, threads));
    if (scratch.floats.size() < sums) scratch.floats.resize(sums);
}

void FloatLinear::apply(Range mine, const Activations& x, int tokens, float* out, ptrdiff_t out_stride, Write write,
                        Scratch& scratch) const noexcept {
    const float* sums = scratch.floats.data();
    by_panels(
        mine, tokens, out, out_stride, write, nullptr,
        [&](Range rows, ptrdiff_t stride) {
            float_product(rows, x.rows(), x.stride(), tokens, scratch.floats.data(), stride);
        },
        [=](int t, int r, ptrdiff_t stride) { return sums[t * stride + r]; }, [&](int) { return scale_; });
}

}  // namespace tritkit

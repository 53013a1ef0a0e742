#include "lines.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace tritkit {

LineLinear::LineLinear(const Stored& source, bool by_columns, float scale, const std::string& activations,
                       const float* bias, Pool& pool, Arena& arena, const Kernels& kernels)
    : Linear(source.rows, source.columns, integer_format(source, activations), bias),
      scale_(scale),
      lines_(lines_of(by_columns ? rows_ : columns_)),
      stride_(ptrdiff_t{lines_} * kBlockBytes),
      weights_(repack_lines(source, by_columns, scale, pool, arena)),
      kernels_(kernels.lines) {}

LineProduct LineLinear::product(const Activations& x, int tokens, int32_t* out, ptrdiff_t out_stride) const {
    const Activations::Codes& c = x.codes(activations_);
    LineProduct p{};
    p.weights = weights_.data();
    p.stride = stride_;
    p.lines = lines_;
    p.codes = c.codes.data();
    p.code_stride = x.code_stride();
    p.sums = c.sums.data();
    p.tokens = tokens;
    p.out = out;
    p.out_stride = out_stride;
    return p;
}

RowLinear::RowLinear(const Stored& source, float scale, const std::string& activations, const float* bias, Pool& pool,
                     Arena& arena, const Kernels& kernels)
    : LineLinear(source, false, scale, activations, bias, pool, arena, kernels), all_(static_cast<size_t>(rows_)) {
    std::iota(all_.begin(), all_.end(), 0);
}

void RowLinear::reserve(int tokens, int threads, Scratch& scratch) const {
    const size_t sums = static_cast<size_t>(
        std::max(waiting_sums(tokens, threads), std::min(tokens, kLineTokens) * round_up(rows_, kTileRows)));
    if (scratch.integers.size() < sums) scratch.integers.resize(sums);
}

void RowLinear::apply(Range mine, const Activations& x, int tokens, float* out, ptrdiff_t out_stride, Write write,
                      Scratch& scratch) const noexcept {
    const Activations::Codes& c = x.codes(activations_);
    const int32_t* sums = scratch.integers.data();
    by_panels(
        mine, tokens, out, out_stride, write, nullptr,
        [&](Range rows, ptrdiff_t stride) {
            LineProduct p = product(x, tokens, scratch.integers.data(), stride);
            p.list = all_.data() + rows.begin;
            p.count = rows.end - rows.begin;
            kernels_->multiply_rows(p);
        },
        [=](int t, int r, ptrdiff_t stride) { return static_cast<float>(sums[t * stride + r]); },
        [&](int t) { return scale_ * c.scales[t]; });
}

void RowLinear::apply_listed(const int32_t* list, int count, const Activations& x, int tokens, float* out,
                             ptrdiff_t out_stride, Scratch& scratch) const noexcept {
    const float* scales = x.codes(activations_).scales.data();
    LineProduct p = product(x, tokens, scratch.integers.data(), round_up(rows_, kTileRows));
    p.list = list;
    p.count = count;
    kernels_->multiply_rows(p);
    for (int t = 0; t < tokens; ++t) {
        const float factor = scale_ * scales[t];
        const int32_t* sums = p.out + t * p.out_stride;
        float* y = out + t * out_stride;
        for (int i = 0; i < count; ++i)
            y[list[i]] =
                static_cast<float>(sums[i]) * factor + (bias_.empty() ? 0.0f : bias_[static_cast<size_t>(list[i])]);
    }
}

ColumnLinear::ColumnLinear(const Stored& source, float scale, const std::string& activations, const float* bias,
                           Pool& pool, Arena& arena, const Kernels& kernels)
    : LineLinear(source, true, scale, activations, bias, pool, arena, kernels) {}

void ColumnLinear::reserve(int tokens, int, Scratch& scratch) const {
    const size_t sums = static_cast<size_t>(tokens) * kLineEntries;
    if (scratch.integers.size() < sums) scratch.integers.resize(sums);
    const size_t panel = static_cast<size_t>(line_scratch(lines_, tokens));
    if (scratch.panel.size() < panel) scratch.panel = AlignedArray<uint8_t>(panel, false);
}

/// Line by line.
void ColumnLinear::apply(Range mine, const Activations& x, int tokens, float* out, ptrdiff_t out_stride, Write write,
                         Scratch& scratch) const noexcept {
    const Activations::Codes& c = x.codes(activations_);
    for (int line = mine.begin / kLineEntries; line * kLineEntries < mine.end; ++line) {
        const Range rows{std::max(mine.begin, line * kLineEntries), std::min(mine.end, (line + 1) * kLineEntries)};
        LineProduct p = product(x, tokens, scratch.integers.data(), kLineEntries);
        p.weights += line * kBlockBytes;
        p.lines = 1;
        p.count = columns_;
        p.scratch = scratch.panel.data();
        kernels_->multiply_columns(p);
        const int32_t* sums = p.out + rows.begin % kLineEntries;
        by_panels(
            rows, tokens, out, out_stride, write, nullptr, [](Range, ptrdiff_t) {},
            [=](int t, int r, ptrdiff_t) { return static_cast<float>(sums[t * kLineEntries + r]); },
            [&](int t) { return scale_ * c.scales[t]; });
    }
}

void ColumnLinear::sums_listed(const int32_t* list, int count, const Activations& x, int tokens, int32_t* sums,
                               Scratch& scratch) const noexcept {
    LineProduct p = product(x, tokens, sums, sums_stride());
    p.list = list;
    p.count = count;
    p.scratch = scratch.panel.data();
    kernels_->add_columns(p);
}

void ColumnLinear::add_sums(Range mine, int32_t* sums, int parts, ptrdiff_t spacing, const Activations& x, int tokens,
                            float* out, ptrdiff_t out_stride) const noexcept {
    for (int i = 1; i < parts; ++i)
        for (int t = 0; t < tokens; ++t) {
            int32_t* total = sums + t * sums_stride();
            const int32_t* part = total + i * spacing;
            for (int r = mine.begin; r < mine.end; ++r) total[r] += part[r];
        }
    const int32_t* totals = sums + mine.begin;
    const ptrdiff_t stride = sums_stride();
    const float* scales = x.codes(activations_).scales.data();
    by_panels(
        mine, tokens, out, out_stride, Write::kAdd, nullptr, [](Range, ptrdiff_t) {},
        [=](int t, int r, ptrdiff_t) { return static_cast<float>(totals[t * stride + r]); },
        [&](int t) { return scale_ * scales[t]; });
}

}  // namespace tritkit

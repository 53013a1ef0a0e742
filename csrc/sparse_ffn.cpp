#include "sparse_ffn.h"

#include <algorithm>
#include <cmath>

namespace tritkit {
namespace {

constexpr int kThresholdTokens = 16;  // of which the thresholds are the mean

}  // namespace

SparseFfn::SparseFfn(const Kernels& kernels, int intermediate, int hidden, int layers, int threads,
                     const Density* forced)
    : kernels_(kernels),
      intermediate_(intermediate),
      forced_(forced != nullptr),
      wanted_(forced ? *forced : Density{}),
      thresholds_(static_cast<size_t>(layers)),
      sums_(static_cast<size_t>(threads) * kLineTokens * static_cast<size_t>(lines_of(hidden) * kLineEntries)) {
    const size_t n = static_cast<size_t>(intermediate);
    for (int i = 0; i < threads; ++i)
        own_.push_back({AlignedArray<int32_t>(n + 16), AlignedArray<float>(n), AlignedArray<int8_t>(n)});
}

void SparseFfn::run(Team& team, int index, const SparseLayer& layer, const SparseStep& step) {
    Linear::Scratch& scratch = step.scratch[static_cast<size_t>(team.rank)];
    Own& own = own_[static_cast<size_t>(team.rank)];
    Chunks chunks(team, intermediate_, layer.gate.rows_together());
    for (Range rows = chunks.next(); !rows.empty(); rows = chunks.next())
        gate_rows(rows, index, layer, step, scratch, own);
    team.barrier();
    const Range mine = team.share(step.tokens);
    for (int t = mine.begin; t < mine.end; ++t) {
        layer.norm(step.gated.row(t));
        step.gated.quantize(t, kernels_, {&layer.down});
    }
    team.barrier();
    const int count = list_columns(layer, step, own);
    if (team.rank == 0) {
        columns_.fetch_add(count, std::memory_order_relaxed);
        all_.fetch_add(intermediate_, std::memory_order_relaxed);
    }
    const ptrdiff_t spacing = kLineTokens * layer.down.sums_stride();
    const Range columns = team.share(count, 4);
    layer.down.sums_listed(own.list.data() + columns.begin, columns.end - columns.begin, step.gated, step.tokens,
                           sums_.data() + team.rank * spacing, scratch);
    team.barrier();
    layer.down.add_sums(team.share(layer.down.rows(), kTileRows), sums_.data(), team.size, spacing, step.gated,
                        step.tokens, step.hidden, layer.down.rows());
    team.barrier();
}

/// gated = max(gate, 0)^2 * up for some rows.
void SparseFfn::gate_rows(Range rows, int index, const SparseLayer& layer, const SparseStep& step,
                          Linear::Scratch& scratch, Own& own) {
    const int n = rows.end - rows.begin;
    layer.gate.apply(rows, step.gate_input, step.tokens, step.gated.row(0), step.gated.stride(), Linear::Write::kStore,
                     scratch);
    const float* gate = step.gated.row(0) + rows.begin;
    if (step.tokens > 1) {
        float* highest = own.highest.data();
        std::copy(gate, gate + n, highest);
        for (int t = 1; t < step.tokens; ++t) {
            const float* other = step.gated.row(t) + rows.begin;
            for (int i = 0; i < n; ++i) highest[i] = other[i] > highest[i] ? other[i] : highest[i];
        }
        gate = highest;
    }
    int32_t* list = own.list.data();
    const int count = kernels_.lines->list_above(gate, n, forced_ ? threshold(index, gate, n) : 0.0f, rows.begin, list);
    rows_.fetch_add(count, std::memory_order_relaxed);
    // Where nothing is computed, whatever was there before could be infinite.
    for (int t = 0; t < step.tokens; ++t) {
        float* up = step.up + static_cast<ptrdiff_t>(t) * intermediate_;
        std::fill(up + rows.begin, up + rows.end, 0.0f);
    }
    layer.up.apply_listed(list, count, step.up_input, step.tokens, step.up, intermediate_, scratch);
    if (forced_) return force(list, count, rows, step);
    for (int t = 0; t < step.tokens; ++t)
        kernels_.vectors->relu2_gate(step.gated.row(t) + rows.begin,
                                     step.up + static_cast<ptrdiff_t>(t) * intermediate_ + rows.begin, n);
}

/// Lists the columns where some token's code is not 0, the same on every thread.
int SparseFfn::list_columns(const SparseLayer& layer, const SparseStep& step, Own& own) const {
    const int8_t* codes = step.gated.codes(layer.down.activations()).codes.data();
    if (step.tokens > 1) {
        int8_t* either = own.nonzero.data();
        std::copy(codes, codes + intermediate_, either);
        for (int t = 1; t < step.tokens; ++t) {
            const int8_t* other = codes + t * step.gated.code_stride();
            for (int i = 0; i < intermediate_; ++i) either[i] = static_cast<int8_t>(either[i] | other[i]);
        }
        codes = either;
    }
    return kernels_.lines->list_nonzero(codes, intermediate_, own.list.data());
}

Density SparseFfn::density() const {
    const double all = static_cast<double>(all_.load());
    return all > 0.0 ? Density{static_cast<double>(rows_.load()) / all, static_cast<double>(columns_.load()) / all}
                     : Density{};
}

/// While the thresholds are found, that of the rows at hand.
float SparseFfn::threshold(int index, const float* gate, int n) {
    Threshold& t = thresholds_[static_cast<size_t>(index)];
    std::lock_guard lock(mutex_);
    if (t.rows < int64_t{kThresholdTokens} * intermediate_) {
        std::vector<float> sorted(gate, gate + n);
        std::sort(sorted.begin(), sorted.end());
        const int below = std::min(static_cast<int>(std::lround((1.0 - wanted_.up) * n)), n);
        const float cut = below == 0 ? -INFINITY : sorted[static_cast<size_t>(below - 1)];
        if (std::isfinite(cut)) t.sum += static_cast<double>(cut) * n;
        t.rows += n;
        return cut;
    }
    return wanted_.up >= 1.0 ? -INFINITY : static_cast<float>(t.sum / static_cast<double>(t.rows));
}

/// Of the rows in the list as many as are wanted get activations that no rounding makes zero, the others none.
void SparseFfn::force(const int32_t* list, int count, Range rows, const SparseStep& step) const {
    const double kept = std::min(wanted_.down / std::max(wanted_.up, 1e-9), 1.0);
    for (int t = 0; t < step.tokens; ++t) {
        float* to = step.gated.row(t);
        const float* up = step.up + static_cast<ptrdiff_t>(t) * intermediate_;
        std::fill(to + rows.begin, to + rows.end, 0.0f);
        double due = 0.5;
        for (int i = 0; i < count; ++i) {
            due += kept;
            if (due < 1.0) continue;
            due -= 1.0;
            to[list[i]] = std::copysign(1.0f, up[list[i]]);
        }
    }
}

}  // namespace tritkit

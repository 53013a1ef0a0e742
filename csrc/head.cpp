#include "head.h"

#include <algorithm>
#include <cmath>

namespace tritkit {
namespace {

constexpr int kChunkRows = kRowsTogether;

float length(const float* x, int n) {
    double squares = 0.0;
    for (int k = 0; k < n; ++k) squares += static_cast<double>(x[k]) * x[k];
    return static_cast<float>(std::sqrt(squares));
}

}  // namespace

Head::Head(LinearPtr linear) : linear_(std::move(linear)) {}

Head::Head(LinearPtr copy, std::shared_ptr<const FloatLinear> exact, RowsPtr rows, std::vector<float> errors)
    : linear_(std::move(copy)), exact_(std::move(exact)), table_(std::move(rows)), errors_(std::move(errors)) {}

void Head::reserve(Activations& x) const { x.reserve(linear_->activations()); }

void Head::reserve(int tokens, int threads, Linear::Scratch& sums) const {
    linear_->reserve(tokens, threads, sums);
    if (exact_) exact_->reserve(tokens, threads, sums);
}

void Head::run(Team& team, const Activations& x, int tokens, bool all_exact, float* logits, ptrdiff_t stride,
               Linear::Scratch& sums, Scratch& scratch) const {
    const bool exactly = screened() && all_exact;
    const Linear& linear = exactly ? static_cast<const Linear&>(*exact_) : *linear_;
    Chunks chunks(team, rows(), kChunkRows);
    for (Range r = chunks.next(); !r.empty(); r = chunks.next())
        linear.apply(r, x, tokens, logits, stride, Linear::Write::kStore, sums);
    if (exactly && team.rank == 0) table_->looked_up(rows(), false);
    if (!screened() || all_exact) return;
    team.barrier();
    screen(team, x, tokens, logits, stride, scratch);
}

void Head::screen(Team& team, const Activations& x, int tokens, float* logits, ptrdiff_t stride,
                  Scratch& scratch) const {
    const Range mine = team.share(rows(), kChunkRows);
    const float deviations = kScreenDeviations / std::sqrt(static_cast<float>(columns()));
    for (int t = 0; t < tokens; ++t) {
        const float margin = deviations * length(x.row(t), columns());
        float floor = -INFINITY;
        for (int r = mine.begin; r < mine.end; ++r)
            floor = std::max(floor, logits[t * stride + r] - margin * errors_[r]);
        scratch.floors[static_cast<size_t>(team.rank * tokens + t)] = floor;
    }
    team.barrier();
    int64_t rescored = 0;
    for (int t = 0; t < tokens; ++t) {
        const float margin = deviations * length(x.row(t), columns());
        float floor = -INFINITY;
        for (int rank = 0; rank < team.size; ++rank)
            floor = std::max(floor, scratch.floors[static_cast<size_t>(rank * tokens + t)]);
        for (int r = mine.begin; r < mine.end; ++r) {
            float& logit = logits[t * stride + r];
            if (logit + margin * errors_[r] < floor) continue;
            logit = exact_->row_product(r, x.row(t));
            table_->looked_up(1, true);  // at once: sometimes there are thousands
            ++rescored;
        }
    }
    rescored_ += rescored;
    if (team.rank == 0) screened_tokens_ += tokens;
}

}  // namespace tritkit

// The output head: logits of the vectors behind the final norm.
//
// Screened, it reads a copy of its rows with 4 bits a weight, which is a quarter of the float rows, and then computes
// again, from the float rows themselves, every logit that could be the highest.
#pragma once

#include <atomic>
#include <vector>

#include "linear.h"
#include "row_table.h"

namespace tritkit {

/// How far a logit of the copy may be from the true one: an error e of a row and a vector x that know nothing of each
/// other give an error of about |e| |x| / sqrt(columns), normally distributed. Five standard deviations: one logit in
/// two millions lies beyond. The certain bound, |e| |x|, is sqrt(columns) / 5 times as wide and would decide nothing.
constexpr float kScreenDeviations = 5.0f;

class Head {
 public:
    /// Every logit from this matrix.
    explicit Head(LinearPtr linear);
    /// `copy` screens, `exact` decides; they have the same rows. errors: of each row (RowIntegers).
    Head(LinearPtr copy, std::shared_ptr<const FloatLinear> exact, RowsPtr rows, std::vector<float> errors);

    int rows() const { return linear_->rows(); }
    int columns() const { return linear_->columns(); }
    const Linear& linear() const { return *linear_; }
    bool screened() const { return exact_ != nullptr; }
    /// What the logits of one token read, but for the rows that are computed again.
    size_t bytes() const { return linear_->bytes(); }
    /// How many logits were computed again so far, and of how many tokens.
    int64_t rescored_rows() const { return rescored_; }
    int64_t screened_tokens() const { return screened_tokens_; }

    /// What the threads tell each other: the highest logit that is sure of each thread and token.
    struct Scratch {
        std::vector<float> floors;  // [threads, tokens]
    };
    void reserve(Activations& x) const;
    void reserve(int tokens, int threads, Linear::Scratch& sums) const;

    /// Logits [tokens, stride] of x, which is quantized. By all threads, with barriers inside; none at the end.
    /// all_exact: no screening.
    void run(Team& team, const Activations& x, int tokens, bool all_exact, float* logits, ptrdiff_t stride,
             Linear::Scratch& sums, Scratch& scratch) const;

 private:
    void screen(Team& team, const Activations& x, int tokens, float* logits, ptrdiff_t stride, Scratch& scratch) const;

    LinearPtr linear_;
    std::shared_ptr<const FloatLinear> exact_;
    RowsPtr table_;
    std::vector<float> errors_;
    mutable std::atomic<int64_t> rescored_{0}, screened_tokens_{0};
};

using HeadPtr = std::shared_ptr<const Head>;

}  // namespace tritkit

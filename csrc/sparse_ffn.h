// The gated MLP with ReLU^2 for a few tokens, without what is multiplied by zero: no row of up where the gate is not
// positive, no column of down whose activation code is 0. A product that is left out is exactly 0, and the sums of
// the products are integers, so the result is bit for bit that of reading everything.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>
#include <vector>

#include "lines.h"

namespace tritkit {

/// The linears of one layer, and the norms of a row in front of down, in place.
struct SparseLayer {
    const Linear& gate;
    const RowLinear& up;
    const ColumnLinear& down;
    std::function<void(float* row)> norm;
};

/// Shares of the rows of up and of the columns of down.
struct Density {
    double up = 1.0, down = 1.0;
};

/// Where the rows and codes of a step lie.
struct SparseStep {
    int tokens;  // at most kLineTokens
    const Activations& gate_input;
    const Activations& up_input;
    const Activations& gated;
    float* up;      // [tokens, intermediate]
    float* hidden;  // [tokens, hidden], what down adds to
    std::vector<Linear::Scratch>& scratch;
};

class SparseFfn {
 public:
    /// forced: null, or the shares to be used, to measure speed at any density: then the gate is shifted, the same for
    /// all rows of a layer, and the activations are numbers that mean nothing.
    SparseFfn(const Kernels& kernels, int intermediate, int hidden, int layers, int threads, const Density* forced);

    void run(Team& team, int index, const SparseLayer& layer, const SparseStep& step);

    /// What has been used since the beginning; all, where nothing has run yet.
    Density density() const;

 private:
    /// What one thread needs for itself.
    struct Own {
        AlignedArray<int32_t> list;    // with room for what is written beyond its end
        AlignedArray<float> highest;   // of the tokens' gates
        AlignedArray<int8_t> nonzero;  // codes of the tokens, or-ed
    };
    /// Where the gate has to be cut for the wanted share: the mean over the first few tokens.
    struct Threshold {
        double sum = 0.0;
        int64_t rows = 0;
    };
    float threshold(int index, const float* gate, int n);
    void gate_rows(Range rows, int index, const SparseLayer& layer, const SparseStep& step, Linear::Scratch& scratch,
                   Own& own);
    void force(const int32_t* list, int count, Range rows, const SparseStep& step) const;
    int list_columns(const SparseLayer& layer, const SparseStep& step, Own& own) const;

    const Kernels& kernels_;
    int intermediate_;
    bool forced_ = false;
    Density wanted_;
    std::mutex mutex_;                   // of the thresholds, while they are found
    std::vector<Threshold> thresholds_;  // of each layer
    std::vector<Own> own_;               // of each thread
    AlignedArray<int32_t> sums_;         // [threads, kLineTokens, rows of down's lines]
    std::atomic<int64_t> rows_{0}, columns_{0}, all_{0};
};

}  // namespace tritkit

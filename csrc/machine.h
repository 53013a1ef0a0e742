// What the machine can do at best, measured with the kernels' own instructions: the roofline that a model is held
// against, and a short probe that tells whether a neighbour is slowing us down.
#pragma once

#include <memory>
#include <vector>

#include "decoder.h"
#include "memory.h"

namespace tritkit {

/// Integer operations a nanosecond (Gop/s) of each thread, while all of them work for about `seconds`.
std::vector<double> integer_peak(Runner& runner, double seconds);

/// A buffer that is read from end to end, each thread its own part. Larger than the caches, it comes from memory.
class MemoryReader {
 public:
    MemoryReader(std::shared_ptr<Runner> runner, size_t bytes);

    /// One pass with so many streams (1, 2, 4 or 8) a thread, each `ahead` bytes behind its prefetch (0: none).
    /// Returns GB/s. Throws std::invalid_argument.
    double pass(int streams, int ahead);

 private:
    std::shared_ptr<Runner> runner_;
    size_t part_;  // bytes a thread
    AlignedArray<uint8_t> bytes_;
    std::vector<uint64_t> sums_;  // keeps the reading from being optimised away
};

/// Seconds of one product in each of some passes over `linears`, which have one shape, with the same tokens. Together
/// larger than the caches, they come from memory, as the layers of a model do.
std::vector<double> product_seconds(Runner& runner, const std::vector<LinearPtr>& linears, int tokens, int passes);

}  // namespace tritkit

#include "machine.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>

namespace tritkit {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

constexpr int64_t kRounds = 2000;  // of the peak loop between two looks at the clock: some 10 us
constexpr int kMostStreams = 8;
constexpr int kChunkRows = kRowsTogether;  // of a product, dealt out as the decoder does

/// Bytes of each of `threads` parts: eight streams of an odd number of cache lines, so that they do not all fall into
/// the same set of a cache.
size_t part_bytes(size_t bytes, int threads) {
    const size_t lines = bytes / kBlockBytes / static_cast<size_t>(threads) / kMostStreams;
    if (lines < 1) throw std::invalid_argument("a buffer of " + std::to_string(bytes) + " bytes is too small to read");
    return (lines - (lines % 2 == 0)) * kBlockBytes * kMostStreams;
}

}  // namespace

std::vector<double> integer_peak(Runner& runner, double seconds) {
    std::vector<double> rates(static_cast<size_t>(runner.pool.size()));
    runner.pool.run([&](Team& team) {
        team.barrier();  // awake, all of them
        const Clock::time_point begin = Clock::now();
        int64_t operations = 0;
        double taken = 0.0;
        while (taken < seconds || operations == 0) {
            operations += runner.kernels.integer_peak(kRounds);
            taken = seconds_since(begin);
        }
        rates[static_cast<size_t>(team.rank)] = static_cast<double>(operations) / taken * 1e-9;
    });
    return rates;
}

MemoryReader::MemoryReader(std::shared_ptr<Runner> runner, size_t bytes)
    : runner_(std::move(runner)),
      part_(part_bytes(bytes, runner_->pool.size())),
      bytes_(part_ * static_cast<size_t>(runner_->pool.size()), false),
      sums_(static_cast<size_t>(runner_->pool.size())) {
    // Memory that was never written is one page of zeros, which the cache holds.
    runner_->pool.run(
        [&](Team& team) { std::memset(bytes_.data() + static_cast<size_t>(team.rank) * part_, 1 + team.rank, part_); });
}

double MemoryReader::pass(int streams, int ahead) {
    if (streams != 1 && streams != 2 && streams != 4 && streams != kMostStreams)
        throw std::invalid_argument("streams is " + std::to_string(streams) + ", expected 1, 2, 4 or 8");
    if (ahead < 0) throw std::invalid_argument("ahead is " + std::to_string(ahead) + ", expected 0 or more");
    std::vector<Clock::time_point> begins(sums_.size());
    runner_->pool.run([&](Team& team) {
        const size_t rank = static_cast<size_t>(team.rank);
        team.barrier();  // awake, all of them
        begins[rank] = Clock::now();
        sums_[rank] ^= runner_->kernels.read_stream(bytes_.data() + rank * part_, part_, streams, ahead);
    });
    // From the first beginning: a thread that was held up at the start would make the others look fast.
    const double taken = seconds_since(*std::min_element(begins.begin(), begins.end()));
    return static_cast<double>(bytes_.bytes()) / std::max(taken, 1e-9) * 1e-9;
}

std::vector<double> product_seconds(Runner& runner, const std::vector<LinearPtr>& linears, int tokens, int passes) {
    if (linears.empty() || tokens < 1) throw std::invalid_argument("there is nothing to multiply");
    const Linear& first = *linears[0];
    for (const LinearPtr& linear : linears)
        if (linear->rows() != first.rows() || linear->columns() != first.columns())
            throw std::invalid_argument("the linears have several shapes");
    Activations x(tokens, first.columns());
    for (const LinearPtr& linear : linears) x.reserve(*linear);
    for (int t = 0; t < tokens; ++t) {
        for (int k = 0; k < first.columns(); ++k) x.row(t)[k] = static_cast<float>((t + k) % 17 - 8);
        x.quantize(t, runner.kernels, {&first});
    }
    std::vector<Linear::Scratch> scratch(static_cast<size_t>(runner.pool.size()));
    for (Linear::Scratch& s : scratch)
        for (const LinearPtr& linear : linears) linear->reserve(tokens, runner.pool.size(), s);
    AlignedArray<float> out(static_cast<size_t>(tokens) * first.rows());
    std::vector<double> seconds;
    for (int pass = 0; pass < passes; ++pass) {
        Clock::time_point begin;
        runner.pool.run([&](Team& team) {
            if (team.rank == 0) begin = Clock::now();
            for (const LinearPtr& linear : linears) {
                Chunks chunks(team, linear->rows(), kChunkRows);
                for (Range rows = chunks.next(); !rows.empty(); rows = chunks.next())
                    linear->apply(rows, x, tokens, out.data(), first.rows(), Linear::Write::kStore,
                                  scratch[static_cast<size_t>(team.rank)]);
                team.barrier();
            }
        });
        seconds.push_back(seconds_since(begin) / static_cast<double>(linears.size()));
    }
    return seconds;
}

}  // namespace tritkit

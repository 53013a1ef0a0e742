#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace tritkit {
namespace {

bool ranks_before(const Candidate& a, const Candidate& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

uint64_t rotate_left(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }

const Candidate& best_of(const std::vector<Candidate>& candidates) {
    return *std::min_element(candidates.begin(), candidates.end(), ranks_before);
}

void keep_top_k(std::vector<Candidate>& candidates, int k) {
    if (k <= 0 || static_cast<size_t>(k) >= candidates.size()) return;
    std::nth_element(candidates.begin(), candidates.begin() + (k - 1), candidates.end(), ranks_before);
    const float threshold = candidates[static_cast<size_t>(k - 1)].logit;
    candidates.erase(std::remove_if(candidates.begin() + k, candidates.end(),
                                    [&](const Candidate& c) { return c.logit < threshold; }),
                     candidates.end());
}

/// Keeps the fewest most likely tokens whose mass reaches p. Ranks 64 of them, then twice as many, until they do.
void keep_top_p(std::vector<Candidate>& candidates, double p, double highest) {
    if (p >= 1.0) return;
    double total = 0.0;
    for (const Candidate& c : candidates) total += std::exp(c.logit - highest);
    double mass = 0.0;
    size_t kept = 0;
    for (size_t ranked = 64; mass < p * total && kept < candidates.size(); ranked *= 2) {
        const size_t end = std::min(ranked, candidates.size());
        const auto from = candidates.begin() + static_cast<ptrdiff_t>(kept);
        const auto to = candidates.begin() + static_cast<ptrdiff_t>(end);
        if (to != candidates.end()) std::nth_element(from, to, candidates.end(), ranks_before);
        std::sort(from, to, ranks_before);
        while (kept < end && mass < p * total) mass += std::exp(candidates[kept++].logit - highest);
    }
    candidates.resize(std::max<size_t>(kept, 1));
}

void keep_min_p(std::vector<Candidate>& candidates, double p, double highest) {
    if (p <= 0.0) return;
    const double threshold = highest + std::log(p);
    candidates.erase(
        std::remove_if(candidates.begin(), candidates.end(), [&](const Candidate& c) { return c.logit < threshold; }),
        candidates.end());
}

}  // namespace

Random::Random(uint64_t seed) {
    for (uint64_t& word : state_) {
        seed += 0x9e3779b97f4a7c15u;
        uint64_t z = seed;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        word = z ^ z >> 31;
    }
}

uint64_t Random::next() {
    const uint64_t result = rotate_left(state_[1] * 5, 7) * 9, shifted = state_[1] << 17;
    state_[2] ^= state_[0];
    state_[3] ^= state_[1];
    state_[1] ^= state_[2];
    state_[0] ^= state_[3];
    state_[2] ^= shifted;
    state_[3] = rotate_left(state_[3], 45);
    return result;
}

void Sampler::penalize(const float* logits, int vocab_size, const int32_t* history, int history_size) {
    candidates_.resize(static_cast<size_t>(vocab_size));
    for (int i = 0; i < vocab_size; ++i) candidates_[static_cast<size_t>(i)] = {logits[i], i};
    const float penalty = options_.repetition_penalty;
    for (int i = 0; i < history_size && penalty != 1.0f; ++i) {
        if (history[i] < 0 || history[i] >= vocab_size)
            throw std::invalid_argument("token " + std::to_string(history[i]) +
                                        " of the history is outside the vocabulary of " + std::to_string(vocab_size));
        const float logit = logits[history[i]];  // of the original, so a token is penalized once
        candidates_[static_cast<size_t>(history[i])].logit = logit > 0.0f ? logit / penalty : logit * penalty;
    }
    // Minus infinity is a way to forbid a token; not a number and plus infinity mean that something is broken.
    const bool finite =
        std::any_of(candidates_.begin(), candidates_.end(), [](const Candidate& c) { return std::isfinite(c.logit); });
    const bool broken = std::any_of(candidates_.begin(), candidates_.end(),
                                    [](const Candidate& c) { return std::isnan(c.logit) || c.logit == INFINITY; });
    if (!finite || broken) throw std::invalid_argument("logits must be finite or -inf, and not all -inf");
}

void Sampler::filter() {
    for (Candidate& c : candidates_) c.logit /= options_.temperature;
    keep_top_k(candidates_, options_.top_k);
    const double highest = best_of(candidates_).logit;
    keep_top_p(candidates_, options_.top_p, highest);
    keep_min_p(candidates_, options_.min_p, highest);
}

int Sampler::sample(const float* logits, int vocab_size, const int32_t* history, int history_size) {
    penalize(logits, vocab_size, history, history_size);
    if (options_.temperature == 0.0f) return best_of(candidates_).token;
    filter();
    const double highest = best_of(candidates_).logit;
    double total = 0.0;
    for (const Candidate& c : candidates_) total += std::exp(c.logit - highest);
    const double drawn = random_.uniform() * total;
    double mass = 0.0;
    for (const Candidate& c : candidates_) {
        mass += std::exp(c.logit - highest);
        if (drawn < mass) return c.token;
    }
    return best_of(candidates_).token;  // only rounding leads here
}

std::vector<std::pair<int, double>> Sampler::distribution(const float* logits, int vocab_size, const int32_t* history,
                                                          int history_size) {
    penalize(logits, vocab_size, history, history_size);
    if (options_.temperature == 0.0f) return {{best_of(candidates_).token, 1.0}};
    filter();
    const double highest = best_of(candidates_).logit;
    double total = 0.0;
    for (const Candidate& c : candidates_) total += std::exp(c.logit - highest);
    std::vector<std::pair<int, double>> kept;
    for (const Candidate& c : candidates_) kept.emplace_back(c.token, std::exp(c.logit - highest) / total);
    return kept;
}

}  // namespace tritkit

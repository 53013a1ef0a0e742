// From logits to a token, without sorting the vocabulary.
//
// In the order of transformers: repetition penalty, temperature, top_k, top_p, min_p, draw. Each filter sees the
// distribution that the one before left. Ties at the edge of top_k all stay; equal logits rank by token id.
#pragma once

#include <cstdint>
#include <vector>

namespace tritkit {

struct SamplingOptions {
    float temperature = 1.0f;         // 0: the most likely token
    int top_k = 0;                    // 0: off
    double top_p = 1.0;               // 1: off
    double min_p = 0.0;               // 0: off
    float repetition_penalty = 1.0f;  // 1: off
};

/// xoshiro256** (Blackman, Vigna 2018), seeded by splitmix64.
class Random {
 public:
    explicit Random(uint64_t seed);
    uint64_t next();
    double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }  // [0, 1)

 private:
    uint64_t state_[4];
};

struct Candidate {
    float logit;
    int token;
};

class Sampler {
 public:
    Sampler(const SamplingOptions& options, uint64_t seed) : options_(options), random_(seed) {}

    /// history: the tokens that the repetition penalty applies to. Throws std::invalid_argument.
    int sample(const float* logits, int vocab_size, const int32_t* history, int history_size);

    /// The tokens that survive the filters with their probabilities, in no particular order; with temperature 0 the
    /// most likely one alone.
    std::vector<std::pair<int, double>> distribution(const float* logits, int vocab_size, const int32_t* history,
                                                     int history_size);

 private:
    void penalize(const float* logits, int vocab_size, const int32_t* history, int history_size);
    void filter();

    SamplingOptions options_;
    Random random_;
    std::vector<Candidate> candidates_;
};

}  // namespace tritkit

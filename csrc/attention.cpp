#include "attention.h"

#include <algorithm>
#include <cmath>

namespace tritkit {

RotaryTable::RotaryTable(int head_dim, double theta) : half_(head_dim / 2) {
    for (int i = 0; i < half_; ++i)
        inverse_frequencies_.push_back(static_cast<float>(std::pow(theta, -2.0 * i / head_dim)));
}

void RotaryTable::extend(int positions) {
    for (int p = static_cast<int>(cos_.size()) / std::max(half_, 1); p < positions; ++p) {
        for (float frequency : inverse_frequencies_) {
            const double angle = static_cast<float>(p) * frequency;
            cos_.push_back(static_cast<float>(std::cos(angle)));
            sin_.push_back(static_cast<float>(std::sin(angle)));
        }
    }
}

void RotaryTable::rotate(const float* x, int position, float* out) const {
    const float* c = cos_.data() + static_cast<size_t>(position) * half_;
    const float* s = sin_.data() + static_cast<size_t>(position) * half_;
    for (int i = 0; i < half_; ++i) {
        const float a = x[i], b = x[i + half_];
        out[i] = a * c[i] - b * s[i];
        out[i + half_] = b * c[i] + a * s[i];
    }
}

void store_token(const HeadShape& shape, const RotaryTable& rotary, const KvPages& pages, const Token& token, int layer,
                 const float* q, const float* k, const float* v, float* rotated) {
    for (int h = 0; h < shape.heads; ++h)
        rotary.rotate(q + h * shape.head_dim, token.position, rotated + h * pages.head_stride());
    for (int h = 0; h < shape.kv_heads; ++h) {
        const float* value = v + h * shape.head_dim;
        rotary.rotate(k + h * shape.head_dim, token.position, pages.keys(*token.sequence, token.position, layer, h));
        std::copy(value, value + shape.head_dim, pages.values(*token.sequence, token.position, layer, h));
    }
}

size_t attention_scratch(const HeadShape& shape, const KvPages& pages, int length) {
    const ptrdiff_t group = shape.heads / shape.kv_heads;
    return static_cast<size_t>(group * (round_up(length, kPagePositions) + pages.head_stride()));
}

void attend(const HeadShape& shape, const KvPages& pages, const Token& token, int layer, int kv_head,
            const float* rotated, float* out, const Kernels& kernels, float* scratch) noexcept {
    const int group = shape.heads / shape.kv_heads, first = kv_head * group;
    const int length = token.position + 1;
    const ptrdiff_t stride = pages.head_stride(), score_stride = round_up(length, kPagePositions);
    float* scores = scratch;                       // [group, score_stride]
    float* sums = scratch + group * score_stride;  // [group, head_stride]

    for (int at = 0; at < length; at += kPagePositions) {
        const int count = std::min(kPagePositions, length - at);
        kernels.matmul_f32({pages.keys(*token.sequence, at, layer, kv_head), stride, static_cast<int>(stride), 0, count,
                            rotated + first * stride, stride, group, scores + at, score_stride});
    }
    const float scaling = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
    std::fill(sums, sums + group * stride, 0.0f);
    for (int g = 0; g < group; ++g) {
        float* score = scores + g * score_stride;
        float* sum = sums + g * stride;
        const float highest = *std::max_element(score, score + length);
        double total = 0.0;
        for (int p = 0; p < length; ++p) {
            score[p] = std::exp((score[p] - highest) * scaling);
            total += score[p];
        }
        for (int at = 0; at < length; at += kPagePositions)
            kernels.add_weighted_rows(pages.values(*token.sequence, at, layer, kv_head), stride,
                                      std::min(kPagePositions, length - at), static_cast<int>(stride), score + at, sum);
        const float inverse = static_cast<float>(1.0 / total);
        for (int i = 0; i < shape.head_dim; ++i) out[(first + g) * shape.head_dim + i] = sum[i] * inverse;
    }
}

}  // namespace tritkit

// Rotary embedding and causal attention over the pages.
#pragma once

#include <vector>

#include "kernels.h"
#include "kv_pages.h"
#include "threads.h"

namespace tritkit {

/// One token of a step: where it is.
struct Token {
    int id;
    const Sequence* sequence;
    int position;
};

struct HeadShape {
    int heads, kv_heads, head_dim;
};

/// cos and sin of position * theta^(-2i / head_dim), as transformers computes them: the angle in float32.
class RotaryTable {
 public:
    RotaryTable(int head_dim, double theta);
    void extend(int positions);
    /// Rotates pairs (i, i + head_dim / 2) of x in place or to another place.
    void rotate(const float* x, int position, float* out) const;

 private:
    int half_;
    std::vector<float> inverse_frequencies_;
    std::vector<float> cos_, sin_;  // [positions, half]
};

/// Rotates q into `rotated` [heads, head_stride] and k, v of one token into their page.
void store_token(const HeadShape& shape, const RotaryTable& rotary, const KvPages& pages, const Token& token, int layer,
                 const float* q, const float* k, const float* v, float* rotated);

/// Floats of scratch that attend() needs for a token that sees `length` positions.
size_t attention_scratch(const HeadShape& shape, const KvPages& pages, int length);

/// softmax(q k^T / sqrt(head_dim)) v of one token for the query heads of one kv head; out: [heads, head_dim].
void attend(const HeadShape& shape, const KvPages& pages, const Token& token, int layer, int kv_head,
            const float* rotated, float* out, const Kernels& kernels, float* scratch) noexcept;

}  // namespace tritkit

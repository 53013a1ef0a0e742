// Rotary embedding, the keys and values that a step adds to the pages, and causal attention over the pages.
#pragma once

#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "kernels.h"
#include "kv_pages.h"
#include "threads.h"

namespace tritkit {

/// One token of a step: where it is. Tokens of one sequence stand together, in the order of their positions.
struct Token {
    int id;
    const Sequence* sequence;
    int position;
};

struct HeadShape {
    int heads, kv_heads, head_dim;
};

/// The turn of each pair of dimensions from one position to the next, [head_dim / 2], and what multiplies cos and sin.
struct Rotary {
    std::vector<float> frequencies;
    float factor = 1.0f;
};

/// cos and sin of position * frequency, as transformers computes them: the angle in float32.
class RotaryTable {
 public:
    explicit RotaryTable(Rotary rotary) : rotary_(std::move(rotary)) {}
    void extend(int positions);
    /// Rotates pairs (i, i + head_dim / 2) of x in place or to another place.
    void rotate(const float* x, int position, float* out) const;

 private:
    Rotary rotary_;
    std::vector<float> cos_, sin_;  // [positions, head_dim / 2]
};

/// Weights, [head_dim], of the norms that queries and keys pass through before they are rotated; null: none.
struct HeadNorms {
    const float *q = nullptr, *k = nullptr;
    float eps = 0.0f;
};

/// Attention of all the tokens of a step, layer by layer: store(), a barrier, attend().
///
/// The softmax of a token is summed up over ranges of kRangePositions positions, and the ranges are merged in order.
/// So the result is the same bits whoever computes which range, and however a prompt is cut into steps. Work is dealt
/// from a counter: blocks of tokens, and each range by itself where there are too few blocks for the threads.
class Attention {
 public:
    Attention(const HeadShape& shape, Rotary rotary, const KvPages& pages, const Kernels& kernels, int threads);
    ~Attention();

    /// What the next step will need; not inside a parallel region. Positions are reserved already.
    void prepare(const std::vector<Token>& tokens, int layers);
    /// Rotates and stores the keys and values of this step, and rotates its queries. q: [tokens, heads, head_dim].
    void store(const Team& team, int layer, const float* q, const float* k, const float* v,
               const HeadNorms& norms = {});
    /// out[token]: [heads, head_dim].
    void attend(const Team& team, int layer, float* out, ptrdiff_t out_stride);

 private:
    struct Block;
    struct Item;
    struct Scratch;

    void store_token(Scratch& scratch, int layer, int kv_head, const Token& token, const float* k, const float* v,
                     const HeadNorms& norms);
    void store_query(Scratch& scratch, ptrdiff_t row, int position, const float* q, const HeadNorms& norms);
    void run(const Item& item, const Item* following, int layer, float* out, ptrdiff_t out_stride, Scratch& scratch);
    void attend_range(const Item& place, const Item* following, int layer, float* partial, Scratch& scratch);
    void find_pages(const Item& place, int layer, const uint8_t** pages) const;
    void merge(const Block& block, int range, float* sum, const float* partial) const;
    float* partial_of(const Block& block, int kv_head, int range);
    static int first_to_see(const Block& block, int range);

    int group() const { return shape_.heads / shape_.kv_heads; }
    bool has_codes() const { return pages_.layout().bits <= 8; }
    ptrdiff_t query_row(int kv_head, int token) const {
        return (static_cast<ptrdiff_t>(kv_head) * capacity_ + token) * group();
    }

    HeadShape shape_;
    const KvPages& pages_;
    const VectorKernels& vectors_;
    float (*quantize_row_)(const float* x, int columns, float levels, int8_t* codes, int32_t* sum);
    RotaryTable rotary_;
    int threads_, size_;  // size_: head_dim rounded up to whole tiles
    ptrdiff_t query_stride_;
    int block_tokens_;

    std::vector<Token> tokens_;
    std::vector<Block> blocks_;
    std::vector<int> runs_;  // where tokens_ begins a page or a sequence, and its end
    std::vector<Item> items_;
    std::vector<Scratch> scratch_;  // per thread

    // [kv_head][token][group] of the step: floats, or codes with their scales and sums.
    int capacity_ = 0;
    AlignedArray<float> queries_, query_scales_;
    AlignedArray<int8_t> query_codes_;
    AlignedArray<int32_t> query_sums_;

    AlignedArray<float> partials_;
    std::unique_ptr<std::atomic<int>[]> next_;        // per layer: the next item
    std::unique_ptr<std::atomic<int>[]> unfinished_;  // per block and kv head: ranges
    int next_size_ = 0, unfinished_size_ = 0;
};

}  // namespace tritkit

#include "attention.h"

#include <algorithm>
#include <cmath>

namespace tritkit {
namespace {

constexpr int kBlockRows = 32;      // query rows that share a pass over the pages: their scores stay in the L1 cache
constexpr int kItemsPerThread = 4;  // with fewer blocks than that the ranges are dealt out too
constexpr float kQueryLevels = 127.0f;

}  // namespace

void RotaryTable::extend(int positions) {
    for (size_t p = cos_.size() / rotary_.frequencies.size(); p < static_cast<size_t>(positions); ++p) {
        for (float frequency : rotary_.frequencies) {
            const double angle = static_cast<float>(p) * frequency;
            cos_.push_back(static_cast<float>(std::cos(angle)) * rotary_.factor);
            sin_.push_back(static_cast<float>(std::sin(angle)) * rotary_.factor);
        }
    }
}

void RotaryTable::rotate(const float* x, int position, float* out) const {
    const size_t half = rotary_.frequencies.size();
    const float* c = cos_.data() + static_cast<size_t>(position) * half;
    const float* s = sin_.data() + static_cast<size_t>(position) * half;
    for (size_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        out[i] = a * c[i] - b * s[i];
        out[i + half] = b * c[i] + a * s[i];
    }
}

/// Consecutive tokens of one sequence.
struct Attention::Block {
    const Sequence* sequence;
    int token, count;
    int position;  // of the first
    int index, ranges;
    int first_partial;  // of its ranges
};

/// All ranges of a block, or one.
struct Attention::Item {
    int block, kv_head;
    int range;  // -1: all
};

struct Attention::Scratch {
    AlignedArray<float> scores, partial, sum, rotated;
    AlignedArray<int8_t> weights;
    AlignedArray<int32_t> products, weight_sums;
    AlignedArray<uint8_t> codes;  // of a key or value, at most 16 bits each; zeros behind them

    Scratch(int rows, int size, ptrdiff_t stride)
        : scores(static_cast<size_t>(rows) * kRangePositions),
          partial(static_cast<size_t>(rows * (size + kPartialExtra))),
          sum(partial.size()),
          rotated(static_cast<size_t>(stride)),
          weights(static_cast<size_t>(rows) * 2 * kRangePositions),
          products(static_cast<size_t>(rows * 2 * size)),
          weight_sums(static_cast<size_t>(rows)),
          codes(static_cast<size_t>(2 * stride)) {}
};

Attention::Attention(const HeadShape& shape, Rotary rotary, const KvPages& pages, const Kernels& kernels, int threads)
    : shape_(shape),
      pages_(pages),
      vectors_(*kernels.vectors),
      quantize_row_(kernels.quantize_row),
      rotary_(std::move(rotary)),
      threads_(threads),
      size_(static_cast<int>(round_up(shape.head_dim, kLanes))),
      query_stride_(round_up(shape.head_dim, 64)),
      block_tokens_(std::max(1, kBlockRows / group())) {
    for (int i = 0; i < threads; ++i) scratch_.emplace_back(block_tokens_ * group(), size_, query_stride_);
}

Attention::~Attention() = default;

void Attention::prepare(const std::vector<Token>& tokens, int layers) {
    tokens_ = tokens;
    const int n = static_cast<int>(tokens.size());
    blocks_.clear();
    runs_.clear();
    items_.clear();
    int partials = 0, longest = 0;
    for (int t = 0; t < n; ++t) {
        const Token& token = tokens[static_cast<size_t>(t)];
        longest = std::max(longest, token.position + 1);
        const bool follows = t > 0 && tokens[static_cast<size_t>(t) - 1].sequence == token.sequence;
        if (!follows || token.position % kPagePositions == 0) runs_.push_back(t);
        if (!follows || token.position % block_tokens_ == 0)
            blocks_.push_back({token.sequence, t, 0, token.position, static_cast<int>(blocks_.size()), 0, 0});
        Block& block = blocks_.back();
        ++block.count;
        block.ranges = token.position / kRangePositions + 1;
    }
    runs_.push_back(n);
    rotary_.extend(longest);
    for (Block& block : blocks_) {
        block.first_partial = partials;
        partials += block.ranges;
    }

    const int blocks = static_cast<int>(blocks_.size());
    const bool split = threads_ > 1 && blocks * shape_.kv_heads < kItemsPerThread * threads_;
    // The longest first; the heads of one range lie side by side in a page.
    for (int range = 0; split && range < (longest + kRangePositions - 1) / kRangePositions; ++range)
        for (const Block& block : blocks_)
            for (int h = 0; range < block.ranges && h < shape_.kv_heads; ++h) items_.push_back({block.index, h, range});
    for (int b = blocks - 1; !split && b >= 0; --b)
        for (int h = 0; h < shape_.kv_heads; ++h) items_.push_back({b, h, -1});

    if (n > capacity_) {
        capacity_ = n;
        const size_t rows = static_cast<size_t>(query_row(shape_.kv_heads, 0));
        if (has_codes()) {
            query_codes_ = AlignedArray<int8_t>(rows * static_cast<size_t>(query_stride_));
            query_scales_ = AlignedArray<float>(rows);
            query_sums_ = AlignedArray<int32_t>(rows);
        } else {
            queries_ = AlignedArray<float>(rows * static_cast<size_t>(query_stride_));
        }
    }
    if (split) {
        const size_t size = static_cast<size_t>(partials) * shape_.kv_heads * scratch_[0].partial.size();
        if (size > partials_.size()) partials_ = AlignedArray<float>(size, false);
    }
    if (layers > next_size_) next_ = std::make_unique<std::atomic<int>[]>(static_cast<size_t>(next_size_ = layers));
    for (int layer = 0; layer < layers; ++layer) next_[static_cast<size_t>(layer)] = 0;
    const int counters = blocks * shape_.kv_heads;
    if (counters > unfinished_size_)
        unfinished_ = std::make_unique<std::atomic<int>[]>(static_cast<size_t>(unfinished_size_ = counters));
    for (int i = 0; i < counters; ++i)
        unfinished_[static_cast<size_t>(i)] = blocks_[static_cast<size_t>(i / shape_.kv_heads)].ranges;
}

// One thread writes all the new positions of a page and head: codes of neighbours may share a byte.
void Attention::store(const Team& team, int layer, const float* q, const float* k, const float* v,
                      const HeadNorms& norms) {
    Scratch& scratch = scratch_[static_cast<size_t>(team.rank)];
    const int runs = static_cast<int>(runs_.size()) - 1;
    for (int item = team.rank; item < runs * shape_.kv_heads; item += team.size) {
        const int kv_head = item % shape_.kv_heads;
        const size_t run = static_cast<size_t>(item / shape_.kv_heads);
        for (int t = runs_[run]; t < runs_[run + 1]; ++t) {
            const ptrdiff_t kv = (static_cast<ptrdiff_t>(t) * shape_.kv_heads + kv_head) * shape_.head_dim;
            store_token(scratch, layer, kv_head, tokens_[static_cast<size_t>(t)], k + kv, v + kv, norms);
            const float* queries = q + (static_cast<ptrdiff_t>(t) * shape_.heads + kv_head * group()) * shape_.head_dim;
            for (int g = 0; g < group(); ++g)
                store_query(scratch, query_row(kv_head, t) + g, tokens_[static_cast<size_t>(t)].position,
                            queries + g * shape_.head_dim, norms);
        }
    }
}

void Attention::store_token(Scratch& scratch, int layer, int kv_head, const Token& token, const float* k,
                            const float* v, const HeadNorms& norms) {
    const KvLayout& layout = pages_.layout();
    const Sequence& sequence = *token.sequence;
    uint8_t* block = pages_.block(sequence, token.position / kPagePositions, layer, kv_head);
    const int position = token.position % kPagePositions;
    float* rotated = scratch.rotated.data();
    if (norms.k) {
        vectors_.rms_norm(k, norms.k, shape_.head_dim, norms.eps, rotated);
        k = rotated;
    }
    rotary_.rotate(k, token.position, rotated);
    if (layout.bits == 32) {
        put_key(layout, block, position, rotated, 0);
        put_value(layout, block, position, v, 0);
        return;
    }
    uint8_t* codes = scratch.codes.data();
    uint16_t scale = vectors_.encode(rotated, shape_.head_dim, layout.bits, codes);
    put_key(layout, block, position, codes, scale);
    scale = vectors_.encode(v, shape_.head_dim, layout.bits, codes);
    put_value(layout, block, position, codes, scale);
    uint8_t* first = token.position == 0 ? pages_.first(sequence, layer, kv_head) : nullptr;
    if (first) {
        uint8_t* value_codes = codes + query_stride_;
        const uint16_t key_scale = vectors_.encode(rotated, shape_.head_dim, 8, codes);
        scale = vectors_.encode(v, shape_.head_dim, 8, value_codes);
        put_first(layout, first, codes, key_scale, value_codes, scale);
    }
}

void Attention::store_query(Scratch& scratch, ptrdiff_t row, int position, const float* q, const HeadNorms& norms) {
    if (norms.q) {
        vectors_.rms_norm(q, norms.q, shape_.head_dim, norms.eps, scratch.rotated.data());
        q = scratch.rotated.data();
    }
    if (!has_codes()) return rotary_.rotate(q, position, queries_.data() + row * query_stride_);
    rotary_.rotate(q, position, scratch.rotated.data());
    query_scales_[static_cast<size_t>(row)] =
        quantize_row_(scratch.rotated.data(), shape_.head_dim, kQueryLevels, query_codes_.data() + row * query_stride_,
                      query_sums_.data() + row);
}

void Attention::attend(const Team& team, int layer, float* out, ptrdiff_t out_stride) {
    std::atomic<int>& next = next_[static_cast<size_t>(layer)];
    const int items = static_cast<int>(items_.size());
    for (int i = next.fetch_add(1); i < items; i = next.fetch_add(1)) {
        // Probably ours too; a wrong guess prefetches for somebody else.
        const Item* following = i + team.size < items ? &items_[static_cast<size_t>(i + team.size)] : nullptr;
        run(items_[static_cast<size_t>(i)], following, layer, out, out_stride,
            scratch_[static_cast<size_t>(team.rank)]);
    }
}

void Attention::run(const Item& item, const Item* following, int layer, float* out, ptrdiff_t out_stride,
                    Scratch& scratch) {
    const Block& block = blocks_[static_cast<size_t>(item.block)];
    float* sum = scratch.sum.data();
    if (item.range < 0) {
        for (int range = 0; range < block.ranges; ++range) {
            const Item more{item.block, item.kv_head, range + 1};
            float* partial = range == 0 ? sum : scratch.partial.data();
            attend_range({item.block, item.kv_head, range}, range + 1 < block.ranges ? &more : following, layer,
                         partial, scratch);
            if (range > 0) merge(block, range, sum, partial);
        }
    } else {
        attend_range(item, following, layer, partial_of(block, item.kv_head, item.range), scratch);
        // Whoever comes last merges, in the order of the ranges, and winds the counter up for the next layer.
        std::atomic<int>& unfinished = unfinished_[static_cast<size_t>(block.index * shape_.kv_heads + item.kv_head)];
        if (unfinished.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
        unfinished.store(block.ranges, std::memory_order_relaxed);
        sum = partial_of(block, item.kv_head, 0);
        for (int range = 1; range < block.ranges; ++range)
            merge(block, range, sum, partial_of(block, item.kv_head, range));
    }
    for (int row = 0; row < block.count * group(); ++row) {
        const float* from = sum + row * (size_ + kPartialExtra);
        const float inverse = 1.0f / from[size_ + 1];
        float* to = out + (block.token + row / group()) * out_stride +
                    (item.kv_head * group() + row % group()) * shape_.head_dim;
        for (int i = 0; i < shape_.head_dim; ++i) to[i] = from[i] * inverse;
    }
}

/// The first token of the block that sees the range, as an offset.
int Attention::first_to_see(const Block& block, int range) {
    return std::max(0, range * kRangePositions - block.position);
}

float* Attention::partial_of(const Block& block, int kv_head, int range) {
    const ptrdiff_t index = static_cast<ptrdiff_t>(block.first_partial + range) * shape_.kv_heads + kv_head;
    return partials_.data() + index * static_cast<ptrdiff_t>(scratch_[0].partial.size());
}

void Attention::merge(const Block& block, int range, float* sum, const float* partial) const {
    const int row = first_to_see(block, range) * group();
    const ptrdiff_t at = static_cast<ptrdiff_t>(row) * (size_ + kPartialExtra);
    vectors_.merge_partials(sum + at, partial + at, block.count * group() - row, size_);
}

/// The head's blocks in the pages of a range, nulls behind the last.
void Attention::find_pages(const Item& place, int layer, const uint8_t** pages) const {
    const Block& block = blocks_[static_cast<size_t>(place.block)];
    const int range = std::max(place.range, 0), last = (block.position + block.count - 1) / kPagePositions;
    for (int i = 0; i < kRangePages; ++i) {
        const int page = range * kRangePages + i;
        pages[i] = page <= last ? pages_.block(*block.sequence, page, layer, place.kv_head) : nullptr;
    }
}

void Attention::attend_range(const Item& place, const Item* following, int layer, float* partial, Scratch& scratch) {
    const Block& block = blocks_[static_cast<size_t>(place.block)];
    const int range = place.range, kv_head = place.kv_head;
    const int first = first_to_see(block, range), rows = (block.count - first) * group();
    const uint8_t *pages[kRangePages] = {}, *next[kRangePages] = {};
    find_pages(place, layer, pages);
    if (following) find_pages(*following, layer, next);
    const ptrdiff_t row = query_row(kv_head, block.token + first);
    RangeWork work{};
    work.layout = &pages_.layout();
    work.pages = pages;
    work.next = next;
    work.first = range == 0 ? pages_.first(*block.sequence, layer, kv_head) : nullptr;
    work.rows = rows;
    work.group = group();
    work.visible = block.position + first + 1 - range * kRangePositions;
    work.scaling = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
    work.query_stride = query_stride_;
    if (has_codes()) {
        work.codes = query_codes_.data() + row * query_stride_;
        work.scales = query_scales_.data() + row;
        work.sums = query_sums_.data() + row;
    } else {
        work.queries = queries_.data() + row * query_stride_;
    }
    work.scores = scratch.scores.data();
    work.weights = scratch.weights.data();
    work.products = scratch.products.data();
    work.weight_sums = scratch.weight_sums.data();
    work.partial = partial + static_cast<ptrdiff_t>(first) * group() * (size_ + kPartialExtra);
    vectors_.attend_range(work);
}

}  // namespace tritkit

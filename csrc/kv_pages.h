// The keys and values of all sequences, float32, in pages of 64 positions that sequences may share.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "memory.h"

namespace tritkit {

constexpr int kPagePositions = 64;

/// One page holds all layers: [layer][kv_head][key, value][position][head_stride].
using Page = AlignedArray<float>;

struct Sequence {
    std::vector<std::shared_ptr<Page>> pages;
    int length = 0;
};

class KvPages {
 public:
    KvPages(int layers, int kv_heads, int head_dim);

    int create();
    /// Shares the full pages of `sequence` and copies its last one if that is only partly filled.
    int fork(int sequence);
    void truncate(int sequence, int length);
    void free(int sequence);
    const Sequence& at(int sequence) const;  // throws std::invalid_argument

    /// Makes room for positions [length, length + count), which no other sequence sees.
    void reserve(int sequence, int count);
    void advance(int sequence, int count);

    float* keys(const Sequence& s, int position, int layer, int kv_head) const {
        return s.pages[position / kPagePositions]->data() + offset(layer, kv_head, 0) +
               position % kPagePositions * head_stride_;
    }
    float* values(const Sequence& s, int position, int layer, int kv_head) const {
        return keys(s, position, layer, kv_head) + kPagePositions * head_stride_;
    }
    /// Floats from one position to the next; those beyond head_dim are zero.
    ptrdiff_t head_stride() const { return head_stride_; }

 private:
    ptrdiff_t offset(int layer, int kv_head, int which) const {
        return ((static_cast<ptrdiff_t>(layer) * kv_heads_ + kv_head) * 2 + which) * kPagePositions * head_stride_;
    }
    std::shared_ptr<Page> new_page();
    Sequence& find(int sequence);
    void drop_pages(Sequence& s, size_t keep);

    int layers_, kv_heads_;
    ptrdiff_t head_stride_;
    std::map<int, Sequence> sequences_;
    int next_ = 0;
    std::vector<std::shared_ptr<Page>> spare_;
};

}  // namespace tritkit

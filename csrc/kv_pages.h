// The keys and values of all sequences, of 32, 16, 8, 4 or 3 bits, in pages of 64 positions that sequences may share.
// vector_table.h draws the bytes of a page's blocks.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "memory.h"
#include "vector_table.h"

namespace tritkit {

/// Throws std::invalid_argument for other widths than 32, 16, 8, 4 and 3.
KvLayout kv_layout(int bits, int head_dim);

/// One page holds all layers: [layer][kv_head][block]. A page of the first position alone, at 8 bits, likewise.
/// Pages are cut from larger slabs, so that huge pages of memory can hold them.
struct Page {
    std::shared_ptr<AlignedArray<uint8_t>> slab;
    uint8_t* data;
};

struct Sequence {
    std::vector<std::shared_ptr<Page>> pages;
    std::shared_ptr<Page> first;  // 4 and 3 bits: position 0 once more, at 8
    int length = 0;
};

class KvPages {
 public:
    KvPages(int layers, int kv_heads, int head_dim, int bits);

    int create();
    /// Shares the full pages of `sequence` and copies its last one if that is only partly filled.
    int fork(int sequence);
    void truncate(int sequence, int length);
    void free(int sequence);
    const Sequence& at(int sequence) const;  // throws std::invalid_argument

    /// Makes room for positions [length, length + count), which no other sequence sees.
    void reserve(int sequence, int count);
    void advance(int sequence, int count);

    const KvLayout& layout() const { return layout_; }
    /// Of all layers, keys and values with their scales and what pads them.
    double bytes_per_position() const { return static_cast<double>(page_bytes()) / kPagePositions; }

    uint8_t* block(const Sequence& s, int page, int layer, int kv_head) const {
        return s.pages[static_cast<size_t>(page)]->data + head_of(layer, kv_head) * layout_.bytes;
    }
    /// Null where the pages have the first position at no fewer bits.
    uint8_t* first(const Sequence& s, int layer, int kv_head) const {
        return s.first ? s.first->data + head_of(layer, kv_head) * layout_.first_bytes : nullptr;
    }

 private:
    ptrdiff_t head_of(int layer, int kv_head) const { return static_cast<ptrdiff_t>(layer) * kv_heads_ + kv_head; }
    size_t page_bytes() const { return static_cast<size_t>(head_of(layers_, 0) * layout_.bytes); }
    std::shared_ptr<Page> new_page();
    Sequence& find(int sequence);
    void drop_pages(Sequence& s, size_t keep);

    int layers_, kv_heads_;
    KvLayout layout_;
    std::map<int, Sequence> sequences_;
    int next_ = 0;
    std::vector<std::shared_ptr<Page>> spare_;
    size_t made_ = 0;  // pages
};

/// Puts the key and the value of one position and head into a block. codes: what `encode` made of them, as long as
/// head_dim rounded up to whole steps, zeros behind the end; at 32 bits the floats themselves.
void put_key(const KvLayout& layout, uint8_t* block, int position_in_page, const void* codes, uint16_t scale);
void put_value(const KvLayout& layout, uint8_t* block, int position_in_page, const void* codes, uint16_t scale);
/// The same for the first position at 8 bits.
void put_first(const KvLayout& layout, uint8_t* first, const uint8_t* key, uint16_t key_scale, const uint8_t* value,
               uint16_t value_scale);

}  // namespace tritkit

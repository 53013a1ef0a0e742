#include "kv_pages.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace tritkit {
namespace {

/// Columns and bytes of a step of a tile.
struct Step {
    int columns;
    ptrdiff_t bytes;
};

Step step_of(int bits) {
    switch (bits) {
        case 32:
            return {1, 64};
        case 16:
            return {1, 32};
        case 8:
            return {4, 64};
        case 4:
            return {8, 64};
        case 3:
            return {32, 192};
    }
    throw std::invalid_argument("kv_bits is " + std::to_string(bits) + ", expected 32, 16, 8, 4 or 3");
}

void put_bits(uint8_t& byte, int shift, int mask, int code) {
    byte = static_cast<uint8_t>((byte & ~(mask << shift)) | (code & mask) << shift);
}

/// One code into row r, column c of a tile.
template <int bits>
void put_code(uint8_t* tile, int r, int c, uint8_t code) {
    const int at = 4 * r + c % 4;
    if (bits == 8) tile[c / 4 * 64 + at] = code;
    if (bits == 4) put_bits(tile[c / 8 * 64 + at], c % 8 / 4 * 4, 15, code);
    if (bits == 3) {
        uint8_t* step = tile + c / 32 * 192;
        put_bits(step[c % 32 / 16 * 64 + at], c % 16 / 4 * 2, 3, code);
        put_bits(step[128 + at], c % 32 / 4, 1, code >> 2);
    }
}

template <int bits>
void put_key_codes(const KvLayout& l, uint8_t* tile, int row, const uint8_t* codes) {
    for (int d = 0; d < l.head_dim; ++d) put_code<bits>(tile, row, d, codes[d]);
}

template <int bits>
void put_value_codes(const KvLayout& l, uint8_t* values, int position, const uint8_t* codes) {
    for (int d = 0; d < l.head_dim; ++d)
        put_code<bits>(values + d / kLanes * l.value_tile, d % kLanes, position, codes[d]);
}

template <class T>
void put_floats(const KvLayout& l, T* keys, int row, const T* from) {
    for (int d = 0; d < l.head_dim; ++d) keys[d * kLanes + row] = from[d];
}

constexpr size_t kSlabBytes = size_t{64} << 20;  // at most; else as much as there is already

/// Pages side by side in one piece of memory, not zeroed; the first comes last.
std::vector<std::shared_ptr<Page>> slab_of(size_t count, size_t bytes) {
    auto slab = std::make_shared<AlignedArray<uint8_t>>(count * bytes, false);
    std::vector<std::shared_ptr<Page>> pages;
    for (size_t i = count; i-- > 0;) pages.push_back(std::make_shared<Page>(Page{slab, slab->data() + i * bytes}));
    return pages;
}

void put_scale(uint8_t* scales, int position, uint16_t scale) {
    std::memcpy(scales + position * sizeof scale, &scale, sizeof scale);
}

}  // namespace

KvLayout kv_layout(int bits, int head_dim) {
    const Step step = step_of(bits);
    KvLayout l{};
    l.bits = bits;
    l.head_dim = head_dim;
    l.key_steps = static_cast<int>(round_up(head_dim, step.columns)) / step.columns;
    l.value_steps = kPagePositions / step.columns;
    l.value_tiles = (head_dim + kLanes - 1) / kLanes;
    l.key_tile = l.key_steps * step.bytes;
    l.value_tile = l.value_steps * step.bytes;
    l.values = kPagePositions / kLanes * l.key_tile;
    l.key_scales = l.values + l.value_tiles * l.value_tile;
    const ptrdiff_t scales = bits <= 8 ? kPagePositions * static_cast<ptrdiff_t>(sizeof(uint16_t)) : 0;
    l.value_scales = l.key_scales + scales;
    l.bytes = l.value_scales + scales;
    if (bits < 8) {
        l.first_values = l.value_tiles * kLanes;
        l.first_scales = 2 * l.first_values;
        l.first_bytes = round_up(l.first_scales + 2 * static_cast<ptrdiff_t>(sizeof(uint16_t)), 64);
    }
    return l;
}

void put_key(const KvLayout& l, uint8_t* block, int position, const void* codes, uint16_t scale) {
    uint8_t* tile = block + position / kLanes * l.key_tile;
    const int row = position % kLanes;
    const auto* bytes = static_cast<const uint8_t*>(codes);
    if (l.bits == 32) put_floats(l, reinterpret_cast<float*>(tile), row, static_cast<const float*>(codes));
    if (l.bits == 16) put_floats(l, reinterpret_cast<uint16_t*>(tile), row, static_cast<const uint16_t*>(codes));
    if (l.bits == 8) put_key_codes<8>(l, tile, row, bytes);
    if (l.bits == 4) put_key_codes<4>(l, tile, row, bytes);
    if (l.bits == 3) put_key_codes<3>(l, tile, row, bytes);
    if (l.bits <= 8) put_scale(block + l.key_scales, position, scale);
}

void put_value(const KvLayout& l, uint8_t* block, int position, const void* codes, uint16_t scale) {
    uint8_t* values = block + l.values;
    const auto* bytes = static_cast<const uint8_t*>(codes);
    if (l.bits == 8) put_value_codes<8>(l, values, position, bytes);
    if (l.bits == 4) put_value_codes<4>(l, values, position, bytes);
    if (l.bits == 3) put_value_codes<3>(l, values, position, bytes);
    if (l.bits <= 8) return put_scale(block + l.value_scales, position, scale);
    const ptrdiff_t size = l.bits / 8;
    for (int d = 0; d < l.head_dim; d += kLanes)
        std::memcpy(values + d / kLanes * l.value_tile + position * kLanes * size, bytes + d * size,
                    static_cast<size_t>(std::min(kLanes, l.head_dim - d) * size));
}

void put_first(const KvLayout& l, uint8_t* first, const uint8_t* key, uint16_t key_scale, const uint8_t* value,
               uint16_t value_scale) {
    std::memcpy(first, key, static_cast<size_t>(l.head_dim));
    std::memcpy(first + l.first_values, value, static_cast<size_t>(l.head_dim));
    put_scale(first + l.first_scales, 0, key_scale);
    put_scale(first + l.first_scales, 1, value_scale);
}

KvPages::KvPages(int layers, int kv_heads, int head_dim, int bits)
    : layers_(layers), kv_heads_(kv_heads), layout_(kv_layout(bits, head_dim)) {}

int KvPages::create() {
    sequences_[next_];
    return next_++;
}

int KvPages::fork(int sequence) {
    Sequence copy = at(sequence);
    const int filled = copy.length % kPagePositions;
    copy.pages.resize(static_cast<size_t>((copy.length + kPagePositions - 1) / kPagePositions));
    if (filled) {
        std::shared_ptr<Page> last = new_page();
        std::memcpy(last->data, copy.pages.back()->data, page_bytes());
        copy.pages.back() = std::move(last);
    }
    sequences_.emplace(next_, std::move(copy));
    return next_++;
}

void KvPages::truncate(int sequence, int length) {
    Sequence& s = find(sequence);
    if (length < 0 || length > s.length)
        throw std::invalid_argument("cannot truncate sequence " + std::to_string(sequence) + " to " +
                                    std::to_string(length) + " tokens, it has " + std::to_string(s.length));
    s.length = length;
    drop_pages(s, static_cast<size_t>((length + kPagePositions - 1) / kPagePositions));
}

void KvPages::free(int sequence) {
    drop_pages(find(sequence), 0);
    sequences_.erase(sequence);
}

const Sequence& KvPages::at(int sequence) const {
    const auto found = sequences_.find(sequence);
    if (found == sequences_.end())
        throw std::invalid_argument("sequence " + std::to_string(sequence) + " does not exist");
    return found->second;
}

Sequence& KvPages::find(int sequence) { return const_cast<Sequence&>(at(sequence)); }

void KvPages::reserve(int sequence, int count) {
    Sequence& s = find(sequence);
    if (layout_.first_bytes && s.length == 0 && count > 0 && (!s.first || s.first.use_count() > 1))
        s.first = slab_of(1, static_cast<size_t>(head_of(layers_, 0) * layout_.first_bytes)).front();
    const size_t needed = static_cast<size_t>((s.length + count + kPagePositions - 1) / kPagePositions);
    // After truncate() the last page may be partly filled and still shared with a fork.
    const size_t partial = s.length % kPagePositions ? static_cast<size_t>(s.length / kPagePositions) : s.pages.size();
    if (count > 0 && partial < s.pages.size() && s.pages[partial].use_count() > 1) {
        std::shared_ptr<Page> own = new_page();
        std::memcpy(own->data, s.pages[partial]->data, page_bytes());
        s.pages[partial] = std::move(own);
    }
    while (s.pages.size() < needed) s.pages.push_back(new_page());
}

void KvPages::advance(int sequence, int count) { find(sequence).length += count; }

std::shared_ptr<Page> KvPages::new_page() {
    if (spare_.empty()) {
        const size_t count = std::max<size_t>(1, std::min(made_, kSlabBytes / std::max<size_t>(page_bytes(), 1)));
        spare_ = slab_of(count, page_bytes());
        made_ += count;
    }
    std::shared_ptr<Page> page = std::move(spare_.back());
    spare_.pop_back();
    std::memset(page->data, 0, page_bytes());  // what is not written yet is read too, and weighs nothing
    return page;
}

void KvPages::drop_pages(Sequence& s, size_t keep) {
    while (s.pages.size() > keep) {
        if (s.pages.back().use_count() == 1) spare_.push_back(std::move(s.pages.back()));
        s.pages.pop_back();
    }
}

}  // namespace tritkit

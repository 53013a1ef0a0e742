#include "kv_pages.h"

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace tritkit {

KvPages::KvPages(int layers, int kv_heads, int head_dim)
    : layers_(layers), kv_heads_(kv_heads), head_stride_(round_up(head_dim, kFloatPad)) {}

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
        std::memcpy(last->data(), copy.pages.back()->data(), last->bytes());
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
    const size_t needed = static_cast<size_t>((s.length + count + kPagePositions - 1) / kPagePositions);
    // After truncate() the last page may be partly filled and still shared with a fork.
    const size_t partial = s.length % kPagePositions ? static_cast<size_t>(s.length / kPagePositions) : s.pages.size();
    if (count > 0 && partial < s.pages.size() && s.pages[partial].use_count() > 1) {
        std::shared_ptr<Page> own = new_page();
        std::memcpy(own->data(), s.pages[partial]->data(), own->bytes());
        s.pages[partial] = std::move(own);
    }
    while (s.pages.size() < needed) s.pages.push_back(new_page());
}

void KvPages::advance(int sequence, int count) { find(sequence).length += count; }

std::shared_ptr<Page> KvPages::new_page() {
    if (spare_.empty()) return std::make_shared<Page>(static_cast<size_t>(offset(layers_, 0, 0)));
    std::shared_ptr<Page> page = std::move(spare_.back());
    spare_.pop_back();
    return page;
}

void KvPages::drop_pages(Sequence& s, size_t keep) {
    while (s.pages.size() > keep) {
        if (s.pages.back().use_count() == 1) spare_.push_back(std::move(s.pages.back()));
        s.pages.pop_back();
    }
}

}  // namespace tritkit

#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

namespace tritkit {
namespace {

constexpr size_t kRegion = size_t{64} << 20;  // what nobody has written to takes no memory

size_t page_bytes() {
    static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return bytes;
}

}  // namespace

/// Maps more than it needs, and lets go of what is before the boundary and behind the end.
void* map_zeros(size_t bytes) {
    const size_t page = page_bytes(), whole = (bytes + page - 1) / page * page, all = whole + kHugePage;
    void* const memory = mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    auto* const begin = static_cast<uint8_t*>(memory);
    const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
    if (before) munmap(begin, before);
    if (before < kHugePage) munmap(begin + before + whole, kHugePage - before);
#if defined(MADV_HUGEPAGE)
    madvise(begin + before, whole, MADV_HUGEPAGE);  // fewer page walks; only a hint
#endif
    return begin + before;
}

void unmap(void* memory, size_t bytes) { munmap(memory, bytes); }

void drop_file_pages(const void* begin, size_t bytes) {
#if defined(__linux__)
    const size_t page = page_bytes();
    const auto from = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
    const auto to = (reinterpret_cast<uintptr_t>(begin) + bytes) / page * page;
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_DONTNEED);
#else
    static_cast<void>(begin), static_cast<void>(bytes);  // elsewhere the system takes them when it needs memory
#endif
}

Bytes Arena::allocate(size_t bytes, uint8_t*& data) {
    std::lock_guard lock(mutex_);
    if (!region_ || region_->size() - used_ < bytes) {
        region_ = std::make_shared<AlignedArray<uint8_t>>(std::max(bytes, kRegion));
        used_ = 0;
    }
    data = region_->data() + used_;
    used_ = std::min(region_->size(), static_cast<size_t>(round_up(static_cast<ptrdiff_t>(used_ + bytes), 64)));
    return Bytes(region_, data, bytes);
}

}  // namespace tritkit

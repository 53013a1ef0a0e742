// A zeroed array on a cache-line boundary.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tritkit {

inline constexpr ptrdiff_t round_up(ptrdiff_t n, ptrdiff_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

template <class T>
class AlignedArray {
    static_assert(std::is_trivial_v<T>, "zeroed and copied as bytes");

 public:
    AlignedArray() = default;
    explicit AlignedArray(size_t size, bool zero = true) : size_(size) {
        constexpr size_t kHugePage = size_t{2} << 20;
        const size_t alignment = bytes() >= 2 * kHugePage ? kHugePage : 64;
        void* memory = std::aligned_alloc(alignment, round_up(bytes() ? bytes() : 1, alignment));
        if (!memory) throw std::bad_alloc();
        data_.reset(static_cast<T*>(memory));
#if defined(__linux__)
        if (alignment == kHugePage) madvise(memory, bytes(), MADV_HUGEPAGE);  // fewer page walks; only a hint
#endif
        if (zero) std::memset(memory, 0, bytes());
    }

    T* data() const { return data_.get(); }
    size_t size() const { return size_; }
    size_t bytes() const { return size_ * sizeof(T); }
    T& operator[](size_t i) const { return data_.get()[i]; }

 private:
    struct Free {
        void operator()(T* memory) const { std::free(memory); }
    };
    size_t size_ = 0;
    std::unique_ptr<T[], Free> data_;
};

}  // namespace tritkit

// Memory on cache-line boundaries: arrays of their own, an arena for the weights, and the pages of mapped files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <type_traits>

namespace tritkit {

inline constexpr ptrdiff_t round_up(ptrdiff_t n, ptrdiff_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

/// A new mapping of zeros on a boundary of 2 MiB, on huge pages where the system has them. Throws std::bad_alloc.
void* map_zeros(size_t bytes);
void unmap(void* memory, size_t bytes);
constexpr size_t kHugePage = size_t{2} << 20;

/// Takes the whole pages inside these bytes out of this process, as if they had never been read. Only for bytes of a
/// read-only mapping of a file, which come back from there when they are asked for.
void drop_file_pages(const void* begin, size_t bytes);

/// An array on a cache-line boundary. A large one is a mapping of its own: zero without being written, and given back
/// to the system at its end, which malloc does not promise.
template <class T>
class AlignedArray {
    static_assert(std::is_trivial_v<T>, "zeroed and copied as bytes");

 public:
    AlignedArray() = default;
    explicit AlignedArray(size_t size, bool zero = true) : size_(size) {
        if (bytes() >= 2 * kHugePage) {
            data_ = {static_cast<T*>(map_zeros(bytes())), Free{bytes()}};
            return;
        }
        constexpr size_t kLine = 64;
        void* memory = std::aligned_alloc(kLine, static_cast<size_t>(round_up(bytes() ? bytes() : 1, kLine)));
        if (!memory) throw std::bad_alloc();
        data_.reset(static_cast<T*>(memory));
        if (zero) std::memset(memory, 0, bytes());
    }

    T* data() const { return data_.get(); }
    size_t size() const { return size_; }
    size_t bytes() const { return size_ * sizeof(T); }
    T& operator[](size_t i) const { return data_.get()[i]; }

 private:
    struct Free {
        size_t mapped = 0;  // bytes of a mapping; 0: from malloc
        void operator()(T* memory) const {
            if (mapped)
                unmap(memory, mapped);
            else
                std::free(memory);
        }
    };
    size_t size_ = 0;
    std::unique_ptr<T[], Free> data_;
};

/// Bytes together with what keeps them alive: an arena, a file that is mapped, an array of Python.
class Bytes {
 public:
    Bytes() = default;
    Bytes(std::shared_ptr<const void> owner, const uint8_t* data, size_t size)
        : data_(std::move(owner), data), size_(size) {}

    const uint8_t* data() const { return data_.get(); }
    size_t size() const { return size_; }

 private:
    std::shared_ptr<const uint8_t> data_;
    size_t size_ = 0;
};

/// Where the weights of an engine lie one behind the other, so that small matrices too are on huge pages. What is
/// allocated keeps its whole region alive.
class Arena {
 public:
    /// Zeros on a cache-line boundary, and the Bytes that keep them.
    Bytes allocate(size_t bytes, uint8_t*& data);

 private:
    std::mutex mutex_;
    std::shared_ptr<AlignedArray<uint8_t>> region_;
    size_t used_ = 0;
};

}  // namespace tritkit

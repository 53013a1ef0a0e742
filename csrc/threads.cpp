#include "threads.h"

#include <chrono>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sched.h>
#endif

namespace tritkit {
namespace {

constexpr auto kSpin = std::chrono::microseconds(50);
constexpr int kMaxThreads = 1024;

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

void Signal::advance() {
    word_.fetch_add(1);
    // A waiter counts itself in before it looks at the word for the last time, so one of the two sees the other.
    if (sleepers_.load() > 0) {
        std::lock_guard lock(mutex_);
        wake_.notify_all();
    }
}

void Signal::wait_beyond(uint32_t seen) {
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 32; ++i) {
            if (word_.load(std::memory_order_acquire) != seen) return;
            relax();
        }
        // The one we wait for may have been put on our own core, behind us.
        std::this_thread::yield();
    } while (std::chrono::steady_clock::now() < deadline);
    std::unique_lock lock(mutex_);
    ++sleepers_;
    wake_.wait(lock, [&] { return word_.load() != seen; });
    --sleepers_;
}

void Team::barrier() {
    if (size == 1) return;
    const uint32_t seen = pool.meet_.load();
    if (pool.arrived_.fetch_add(1) + 1 == size) {
        pool.arrived_.store(0);
        pool.meet_.advance();
    } else {
        pool.meet_.wait_beyond(seen);
    }
}

Range Team::share(int n, int unit) const {
    const int64_t units = (n + unit - 1) / unit;
    const int begin = static_cast<int>(units * rank / size) * unit;
    const int end = static_cast<int>(units * (rank + 1) / size) * unit;
    return {begin < n ? begin : n, end < n ? end : n};
}

Pool::Pool(int threads) : size_(threads == 0 ? usable_cores() : threads) {
    if (size_ < 1 || size_ > kMaxThreads)
        throw std::invalid_argument("threads is " + std::to_string(threads) + ", expected 0 (all usable cores) to " +
                                    std::to_string(kMaxThreads));
    for (int rank = 1; rank < size_; ++rank) workers_.emplace_back([this, rank] { work(rank); });
}

Pool::~Pool() {
    body_ = nullptr;
    start_.advance();
    for (std::thread& worker : workers_) worker.join();
}

void Pool::run(const std::function<void(Team&)>& body) {
    std::lock_guard lock(one_region_);
    body_ = &body;
    start_.advance();
    Team team{*this, 0, size_};
    body(team);
    team.barrier();  // nobody reads body_ any more
}

void Pool::work(int rank) {
    Team team{*this, rank, size_};
    for (uint32_t seen = 0;; ++seen) {
        start_.wait_beyond(seen);
        if (!body_) return;
        (*body_)(team);
        team.barrier();
    }
}

int usable_cores() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    const unsigned n = std::thread::hardware_concurrency();
    return n ? static_cast<int>(n) : 1;
}

}  // namespace tritkit

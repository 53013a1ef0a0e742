// A persistent pool of threads that all run the same function (SPMD) and meet at barriers.
// Waiting spins for some 50 us, since the next meeting is near, then sleeps, since other people need the machine too.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace tritkit {

struct Range {
    int begin, end;
    bool empty() const { return begin >= end; }
};

/// A word that threads wait on: first spinning, then sleeping.
class Signal {
 public:
    uint32_t load() const { return word_.load(); }
    void advance();                   // adds one and wakes all that wait
    void wait_beyond(uint32_t seen);  // until the word is not `seen`

 private:
    std::atomic<uint32_t> word_{0};
    std::atomic<int> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
};

class Pool;

/// One thread's view of a parallel region.
struct Team {
    Pool& pool;
    int rank, size;

    void barrier();
    /// This thread's share of n items, whole multiples of `unit` but for the last.
    Range share(int n, int unit = 1) const;
};

class Pool {
 public:
    explicit Pool(int threads);  // 0: one for each usable core
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int size() const { return size_; }

    /// Runs body on every thread, the caller being rank 0. The body must not throw.
    void run(const std::function<void(Team&)>& body);

 private:
    friend struct Team;
    void work(int rank);

    int size_;
    std::mutex one_region_;
    const std::function<void(Team&)>* body_ = nullptr;  // null: time to go
    Signal start_, meet_;
    std::atomic<int> arrived_{0};
    std::vector<std::thread> workers_;
};

int usable_cores();

}  // namespace tritkit

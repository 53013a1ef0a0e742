// A persistent pool of threads that all run the same function (SPMD) and meet at barriers.
// Waiting spins for some 20 us, since the next meeting is near, then sleeps, since other people need the machine too.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
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

/// A mutex that a fork of the process waits for, so that the child never finds it locked or what it guards half-done.
class ForkSafeMutex {
 public:
    void lock();
    void unlock();

 private:
    std::mutex mutex_;
};

class Pool;

/// One thread's view of a parallel region.
struct Team {
    Pool& pool;
    int rank, size;
    uint32_t loops = 0;  // Chunks made so far in this region

    void barrier();
    /// This thread's share of n items, whole multiples of `unit` but for the last.
    Range share(int n, int unit = 1) const;
};

/// Items 0 ... n - 1 dealt out to whoever comes, so that a slow thread does less and nobody waits for it: large chunks
/// at first, whole multiples of `unit` but for the last, then smaller ones. Who gets which is chance, so an item's
/// result must not depend on it. Every thread of a region makes the same Chunks in the same order and takes them until
/// none is left; a barrier between two loops is needed only for what the second reads of the first.
///     Chunks chunks(team, n, unit);
///     for (Range r = chunks.next(); !r.empty(); r = chunks.next()) ...
class Chunks {
 public:
    Chunks(Team& team, int n, int unit);
    Range next();  // empty: nothing is left

 private:
    std::atomic<uint64_t>& dealt_;
    uint32_t loop_;
    int n_, unit_, size_;
};

/// The most items that Chunks gives to one of `threads` threads at a time.
int64_t largest_chunk(int n, int threads, int unit);

/// In a child of fork() the threads are gone; the first region there starts new ones.
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
    friend class Chunks;
    struct Crew;
    bool crew_is_gone() const;

    int size_;
    ForkSafeMutex one_region_;
    std::unique_ptr<Crew> crew_;
    unsigned process_;  // how many forks this process was from the first one when the crew came
};

int usable_cores();

}  // namespace tritkit

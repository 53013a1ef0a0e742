#include "threads.h"

#include <pthread.h>

#include <chrono>
#include <stdexcept>
#include <string>
#include <system_error>

#if defined(__linux__)
#include <sched.h>
#endif

namespace tritkit {
namespace {

constexpr auto kSpin = std::chrono::microseconds(20);
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
    // No yield: where another process wants this core, that gives it a whole time slice, and everybody here waits for
    // it.
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 32; ++i) {
            if (word_.load(std::memory_order_acquire) != seen) return;
            relax();
        }
    } while (std::chrono::steady_clock::now() < deadline);
    std::unique_lock lock(mutex_);
    ++sleepers_;
    wake_.wait(lock, [&] { return word_.load() != seen; });
    --sleepers_;
}

// Counts who is inside. A fork waits until nobody is and keeps the gate shut until it is done.
namespace {

struct Gate {
    std::mutex mutex;
    std::condition_variable left;
    int inside = 0;
};
Gate* gate = nullptr;  // never freed: a process may fork while it exits
std::atomic<unsigned> forks{0};

void before_fork() {
    std::unique_lock lock(gate->mutex);
    gate->left.wait(lock, [] { return gate->inside == 0; });
    lock.release();
}

void after_fork_in_parent() { gate->mutex.unlock(); }

void after_fork_in_child() {
    new (&gate->left) std::condition_variable;  // threads that waited there do not exist any more
    forks.fetch_add(1);
    gate->mutex.unlock();
}

void watch_forks() {
    static std::once_flag once;
    std::call_once(once, [] {
        gate = new Gate;
        pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
    });
}

}  // namespace

void ForkSafeMutex::lock() {
    watch_forks();
    {
        std::lock_guard lock(gate->mutex);
        ++gate->inside;
    }
    mutex_.lock();
}

void ForkSafeMutex::unlock() {
    mutex_.unlock();
    std::lock_guard lock(gate->mutex);
    if (--gate->inside == 0) gate->left.notify_all();
}

/// The threads of a pool and what they share.
struct Pool::Crew {
    explicit Crew(Pool& pool);
    ~Crew() { leave(); }
    void work(Pool& pool, int rank);
    void leave();

    const std::function<void(Team&)>* body = nullptr;  // null: time to go
    Signal start, meet;
    std::atomic<int> arrived{0};
    std::atomic<uint64_t> dealt{0};  // number of a loop << 32 | its first item that nobody has
    std::vector<std::thread> workers;
};

Pool::Crew::Crew(Pool& pool) {
    try {
        for (int rank = 1; rank < pool.size_; ++rank) workers.emplace_back([this, &pool, rank] { work(pool, rank); });
    } catch (const std::system_error&) {
        leave();
        throw std::runtime_error("the system refused thread " + std::to_string(workers.size() + 2) + " of " +
                                 std::to_string(pool.size_));
    }
}

void Pool::Crew::work(Pool& pool, int rank) {
    for (uint32_t seen = 0;; ++seen) {
        start.wait_beyond(seen);
        if (!body) return;
        Team team{pool, rank, pool.size_};
        (*body)(team);
        team.barrier();
    }
}

void Pool::Crew::leave() {
    body = nullptr;
    start.advance();
    for (std::thread& worker : workers) worker.join();
}

void Team::barrier() {
    if (size == 1) return;
    Pool::Crew& crew = *pool.crew_;
    const uint32_t seen = crew.meet.load();
    if (crew.arrived.fetch_add(1) + 1 == size) {
        crew.arrived.store(0);
        crew.meet.advance();
    } else {
        crew.meet.wait_beyond(seen);
    }
}

Range Team::share(int n, int unit) const {
    const int64_t units = (n + unit - 1) / unit;
    const int begin = static_cast<int>(units * rank / size) * unit;
    const int end = static_cast<int>(units * (rank + 1) / size) * unit;
    return {begin < n ? begin : n, end < n ? end : n};
}

Chunks::Chunks(Team& team, int n, int unit)
    : dealt_(team.pool.crew_->dealt), loop_(++team.loops), n_(n), unit_(unit), size_(team.size) {}

int64_t largest_chunk(int n, int threads, int unit) {
    const int64_t units = (static_cast<int64_t>(n) + unit - 1) / unit;
    return (threads == 1 ? units : (units + 2 * threads - 1) / (2 * threads)) * unit;
}

Range Chunks::next() {
    uint64_t seen = dealt_.load(std::memory_order_relaxed);
    for (;;) {
        // A thread goes on to the next loop only when nothing is left of this one.
        const uint32_t loop = static_cast<uint32_t>(seen >> 32);
        if (loop > loop_) return {n_, n_};
        const int begin = loop == loop_ ? static_cast<int>(seen & 0xffffffffu) : 0, left = n_ - begin;
        if (left <= 0) return {n_, n_};
        const int64_t count = largest_chunk(left, size_, unit_);
        const int end = count < left ? begin + static_cast<int>(count) : n_;
        if (dealt_.compare_exchange_weak(seen, static_cast<uint64_t>(loop_) << 32 | static_cast<uint32_t>(end),
                                         std::memory_order_relaxed))
            return {begin, end};
    }
}

Pool::Pool(int threads) : size_(threads == 0 ? usable_cores() : threads) {
    if (size_ < 1 || size_ > kMaxThreads)
        throw std::invalid_argument("threads is " + std::to_string(threads) + ", expected 0 (all usable cores) to " +
                                    std::to_string(kMaxThreads));
    watch_forks();
    process_ = forks.load();
    crew_ = std::make_unique<Crew>(*this);
}

Pool::~Pool() {
    if (crew_is_gone()) static_cast<void>(crew_.release());
}

/// A crew that is gone is let go of, not destroyed: there is nobody to join.
bool Pool::crew_is_gone() const { return process_ != forks.load(); }

void Pool::run(const std::function<void(Team&)>& body) {
    std::lock_guard lock(one_region_);
    if (crew_is_gone()) {
        static_cast<void>(crew_.release());
        process_ = forks.load();
        crew_ = std::make_unique<Crew>(*this);
    }
    crew_->body = &body;
    crew_->dealt.store(0, std::memory_order_relaxed);
    crew_->start.advance();
    Team team{*this, 0, size_};
    body(team);
    team.barrier();  // nobody reads the body any more
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

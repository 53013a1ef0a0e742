// Every instruction set against scalar: random and extreme inputs, odd sizes. No Python, so that sanitizers and
// emulators can run it. Says what differs; the exit status is the number of kernels that do.
#include <chrono>
#include <cmath>
#include <cstdio>

#include "decoder.h"
#include "test_support.h"

using namespace tritkit;

std::mt19937 random_numbers(1);
int failures = 0;

namespace {

/// Barriers of a pool keep every thread's writes before every other thread's reads; pauses let the threads sleep.
void test_pool() {
    for (int threads : {1, 2, 3, 8}) {
        Pool pool(threads);
        std::vector<int> counts(static_cast<size_t>(threads));
        bool good = true;
        for (int round = 0; round < 200; ++round) {
            if (round % 50 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
            pool.run([&](Team& team) {
                for (int i = 0; i < 5; ++i) {
                    ++counts[static_cast<size_t>(team.rank)];
                    team.barrier();
                    if (team.rank == 0)
                        for (int count : counts) good = good && count == counts[0];
                    team.barrier();
                }
            });
        }
        expect(good && counts[0] == 1000, "pool", "threads", threads, 0, 0);
    }
}

/// Every item is dealt out once, in loop after loop without a barrier, however long a thread stays away.
void test_chunks() {
    for (int threads : {1, 2, 3, 8}) {
        Pool pool(threads);
        for (const auto& work : {std::pair{0, 4}, {1, 4}, {7, 1}, {100, 16}, {1000, 1}}) {
            constexpr int kLoops = 20;
            const int n = work.first, unit = work.second;
            std::vector<std::atomic<int>> dealt(static_cast<size_t>(kLoops * n));
            std::atomic<bool> good{true};
            pool.run([&](Team& team) {
                for (int loop = 0; loop < kLoops; ++loop) {
                    if (team.rank == loop % 4) std::this_thread::sleep_for(std::chrono::microseconds(100));
                    Chunks chunks(team, n, unit);
                    for (Range r = chunks.next(); !r.empty(); r = chunks.next()) {
                        if (r.begin % unit || r.begin < 0 || r.end > n) good = false;
                        if (r.end - r.begin > largest_chunk(n, threads, unit)) good = false;
                        for (int i = r.begin; i < r.end; ++i) ++dealt[static_cast<size_t>(loop * n + i)];
                    }
                }
            });
            for (const std::atomic<int>& count : dealt) good = good && count == 1;
            expect(good, "chunks", "threads", threads, n, unit);
        }
    }
}

/// The limits' loops: every byte is read once, and the operations are counted.
void test_machine(const char* isa) {
    const Kernels& kernels = kernels_for(isa);
    for (int streams : {1, 2, 4, 8}) {
        for (int ahead : {0, 2048}) {
            AlignedArray<uint64_t> words(static_cast<size_t>(24 * streams));
            uint64_t expected = 0;
            for (size_t i = 0; i < words.size(); ++i) {
                words[i] = (i + 1) * 0x9e3779b97f4a7c15u;
                expected ^= words[i];
            }
            const auto* bytes = reinterpret_cast<const uint8_t*>(words.data());
            expect(kernels.read_stream(bytes, words.bytes(), streams, ahead) == expected, "read_stream", isa, streams,
                   ahead, 0);
        }
    }
    expect(kernels.integer_peak(3) == 3 * kernels.integer_peak(1), "integer_peak", isa, 3, 0, 0);
}

}  // namespace

int main() {
    test_pool();
    test_chunks();
    test_repack();
    test_rows();
    test_ternary_blocks();
    test_attention();
    test_quantizers();
    for (const std::string& isa : available_isas()) {
        test_integers(isa.c_str());
        test_tiles(isa.c_str());
        test_lines(isa.c_str());
        test_line_linears(isa.c_str());
        test_quantize(isa.c_str());
        test_groups(isa.c_str());
        test_input_grids(isa.c_str());
        test_blocks(isa.c_str());
        test_floats(isa.c_str());
        test_vectors(isa.c_str());
        test_exp(isa.c_str());
        test_machine(isa.c_str());
        test_decoder(isa.c_str());
        test_sparse_decoder(isa.c_str());
        std::printf("%s: done\n", isa.c_str());
    }
    std::printf("%d failures\n", failures);
    return failures;
}

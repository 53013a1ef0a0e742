// What the files of the test program share.
#pragma once

#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "decoder.h"

extern std::mt19937 random_numbers;
extern int failures;

inline int random_int(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_numbers); }
inline float random_float() { return std::normal_distribution<float>()(random_numbers); }

inline void expect(bool good, const char* what, const char* isa, int rows, int columns, int tokens) {
    if (good) return;
    std::printf("FAILED %s on %s: %d x %d, %d tokens\n", what, isa, rows, columns, tokens);
    ++failures;
}

// test_groups.cpp
void test_groups(const char* isa);
void test_input_grids(const char* isa);

// test_tiles.cpp
/// Bytes of a file with random codes, or with one code everywhere.
std::vector<uint8_t> random_source(const tritkit::SourceLayout& layout, int rows, int columns, int code);
/// A matrix of a file whose bytes stay the caller's.
tritkit::Stored stored(const tritkit::SourceLayout& layout, const std::vector<uint8_t>& source, int rows, int columns);
/// Codes as the drawings of the run-time layouts in kernels.h say.
int runtime_code(tritkit::Runtime runtime, const uint8_t* tile, int r, int k);
void test_repack();
void test_rows();
void test_integers(const char* isa);
void test_tiles(const char* isa);
void test_lines(const char* isa);
void test_line_linears(const char* isa);
void test_quantize(const char* isa);

// test_blocks.cpp
void test_blocks(const char* isa);
void test_ternary_blocks();
void test_floats(const char* isa);
void test_vectors(const char* isa);
void test_quantizers();

// test_decoder.cpp
void test_exp(const char* isa);
void test_attention();
void test_sparse_decoder(const char* isa);
void test_decoder(const char* isa);

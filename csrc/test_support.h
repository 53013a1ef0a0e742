// What the files of the test program share.
#pragma once

#include <cstdio>
#include <random>

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

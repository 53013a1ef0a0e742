// Ternary weights of which a part may be left unread. Plain data only, like kernels.h.
//
// Run-time layout "L64-3": every row of a matrix, or every column, lies by itself in 64-byte lines, a "vector" below.
// A line holds 320 entries, a byte five trits of entries that are 64 apart, as in T16-3: field f of byte i is entry
// 320 * line + 64 * f + i. Entries beyond the last one may hold any code.
//
//   rows    | entry 0 .. 63 | 64 .. 127 | 128 .. 191 | 192 .. 255 | 256 .. 319 |  fields of the 64 bytes of line 0
//   columns the same, but the 16 words of four entries in each 64 lie in the order 0, 4, 8, 12, 1, 5, ... (a 4 x 4
//           square, transposed): the bytes of four columns, interleaved within 128 bits, then are rows in order.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tritkit {

constexpr int kLineFields = 5;
constexpr int kLineEntries = 64 * kLineFields;
constexpr int lines_of(int entries) { return (entries + kLineEntries - 1) / kLineEntries; }

/// The byte of a column's line that holds entry i of each 64.
constexpr int column_byte(int i) { return i / 4 % 4 * 16 + i / 16 * 4 + i % 4; }

/// Exact integer products of some vectors with some tokens.
struct LineProduct {
    const uint8_t* weights;
    ptrdiff_t stride;     // bytes from one vector to the next
    int lines;            // of a vector that are used
    const int32_t* list;  // [count]: which vectors, ascending; multiply_columns: all
    int count;
    const int8_t* codes;  // [tokens, code_stride], zero beyond the last column
    ptrdiff_t code_stride;
    const int32_t* sums;  // [tokens], of each token's codes; not for add_columns
    int tokens;
    int32_t* out;  // [tokens, out_stride]
    ptrdiff_t out_stride;
    uint8_t* scratch;  // for columns: aligned
};

constexpr int kLineTokens = 4;  // add_columns: at most
constexpr int kLinePanel =
    480;  // multiply_columns unpacks so many columns together; tiles of 512 would meet in the cache

/// Bytes of scratch that add_columns and multiply_columns need.
constexpr ptrdiff_t line_scratch(int lines, int tokens) {
    const ptrdiff_t waiting = ptrdiff_t{lines} * tokens * 6 * 64 * 4, panel = ptrdiff_t{kLinePanel} * kLineEntries;
    return tokens > kLineTokens || waiting < panel ? panel : waiting;
}

struct LineKernels {
    bool faster;  // than T16-3, where about half of the vectors are listed

    /// out[t][i] = sum over k of (code[list[i]][k] - 1) * x[t][k].
    void (*multiply_rows)(const LineProduct&);
    /// out[t][r] = sum over i of (code[list[i]][r] - 1) * x[t][list[i]], for all rows of the lines.
    void (*add_columns)(const LineProduct&);
    /// The same over columns 0 .. count - 1, for any number of tokens.
    void (*multiply_columns)(const LineProduct&);
    /// Lists first + i where x[i] > above, or codes[i] != 0, and returns how many. The list has room for n + 15.
    int (*list_above)(const float* x, int n, float above, int first, int32_t* list);
    int (*list_nonzero)(const int8_t* codes, int n, int32_t* list);
};

}  // namespace tritkit

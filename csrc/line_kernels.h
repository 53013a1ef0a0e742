// The products of L64-3 lines (line_table.h has the layout) with int8 activations, over 64-byte vectors V. Included
// after tile_kernels.h, whose Trits and whose way to multiply without taking trits out these use.
//
//   rows: the activations are a vector, too      columns: the bytes of four columns become blocks of T16
//   | w 0  | w 1  | ... | w 63  |                | a 0 | a 1 | ... |      | a 0 | b 0 | c 0 | d 0 | a 1 | ... |
//   | x 0  | x 1  | ... | x 63  |  field 0       | b 0 | b 1 | ... |  ->  | x_a | x_b | x_c | x_d | x_a | ... |
//   | x 64 | x 65 | ... | x 127 |  field 1       | c 0 | c 1 | ... |      the same activations for every field
//   dot() of four rows, summed sideways          | d 0 | d 1 | ... |      dot() adds 4 products to each row's sum
//   at the end
//
// Four vectors go together. Where the list has gaps, most of what a processor fetches ahead on its own would be these,
// so the list says what is prefetched, and rows are read from both ends in turn, which no processor takes for a stream.
//
// V has, besides what tile_kernels.h asks for: sum4, interleave; with kRowTokens tokens two rows fit into its
// registers.

constexpr int kRowsAhead = 4;     // from the product to the prefetch, in each part of the list
constexpr int kColumnGroup = 32;  // columns that are added to sums while these are in registers

/// The i-th row of a part of the list, `share` rows long: of one of several streams, if the list is long and dense.
/// Behind the end of its part the last one stands in.
TRITKIT_INLINE const uint8_t* listed_row(const LineProduct& p, int share, int i, int part) {
    const int at = part * share + (i < share ? i : share - 1);
    return p.weights + p.list[at < p.count ? at : p.count - 1] * p.stride;
}

/// Rows that will be needed, each fetched as a whole, in step with the lines of those that are.
template <int n>
struct RowsAhead {
    const uint8_t* rows[n + 1];  // and one that is never fetched
    const uint8_t* const* next = rows;
    int lines, due = 0;

    TRITKIT_INLINE void one_line_of_each(RowsAhead& a) {
        for (a.due += n; a.due >= a.lines; a.due -= a.lines, ++a.next) {
            const uint8_t *low = *a.next, *high = low + (a.lines - 1) * kBlockBytes;
            for (; low <= high; low += kBlockBytes, high -= kBlockBytes) {
                __builtin_prefetch(low);
                __builtin_prefetch(high);
            }
        }
    }
};

/// So many rows together fit into the registers with so many tokens.
constexpr int rows_together(int tokens) { return tokens <= 4 ? 4 : 2; }

/// The at-th row of each part of the list with some tokens. With few of them no trit is taken out, see one_token.
template <class V, bool gaps, int tokens>
void rows_product(const LineProduct& p, int share, int at, int token) {
    constexpr int n = rows_together(tokens);
    constexpr bool linear = tokens <= 3;
    const uint8_t* rows[n];
    RowsAhead<n> ahead;
    ahead.lines = p.lines;
    for (int r = 0; r < n; ++r) {
        rows[r] = listed_row(p, share, at, r);
        ahead.rows[r] = listed_row(p, share, at + kRowsAhead, r);
    }
    const int8_t* x = p.codes + token * p.code_stride;
    constexpr int padded = n == 4 ? tokens : (tokens + 1) / 2 * 2;
    typename V::Ints sums[padded][n], rest[padded][n];
    clear(sums, V::splat32(0));
    clear(rest, V::splat32(0));
    for (int i = 0; i < p.lines; ++i) {
        const int line = gaps && i % 2 ? p.lines - 1 - i / 2 : gaps ? i / 2 : i;
        const int8_t* field = x + line * kLineEntries;
        typename V::Bytes q[n];
        if constexpr (gaps) RowsAhead<n>::one_line_of_each(ahead);
#pragma GCC unroll 4
        for (int r = 0; r < n; ++r) {
            if constexpr (!gaps) __builtin_prefetch(ahead.rows[r] + line * kBlockBytes);
            q[r] = V::load(rows[r] + line * kBlockBytes);
        }
#pragma GCC unroll 8
        for (int f = 0; f < kLineFields; ++f, field += kBlockBytes) {
            typename V::Bytes codes[n];
#pragma GCC unroll 4
            for (int r = 0; r < n; ++r) {
                codes[r] = linear ? q[r] : Trits::take<V>(q[r]);
                if constexpr (linear) q[r] = V::add(q[r], V::add(q[r], q[r]));
            }
#pragma GCC unroll 8
            for (int t = 0; t < tokens; ++t) {
                const auto v = V::load(reinterpret_cast<const uint8_t*>(field + t * p.code_stride));
#pragma GCC unroll 4
                for (int r = 0; r < n; ++r) {
                    sums[t][r] = V::template dot<linear ? 255 : 2>(sums[t][r], codes[r], v);
                    if constexpr (linear) rest[t][r] = V::template dot<255>(rest[t][r], q[r], v);
                }
            }
        }
    }
    int32_t results[padded * n];
#pragma GCC unroll 8
    for (int t = 0; t < tokens; t += 4 / n) {
        typename V::Ints four[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const auto sum = sums[t + i / n][i % n];
            four[i] = sum;
            if constexpr (linear) four[i] = V::minus(V::plus(sum, V::plus(sum, sum)), rest[t + i / n][i % n]);
        }
        V::sum4(four, results + t * n);
    }
    for (int t = 0; t < tokens; ++t) {
        int32_t* out = p.out + (token + t) * p.out_stride;
        for (int r = 0; r < n && r * share + at < p.count; ++r) {
            const int32_t sum = results[t * n + r];
            out[r * share + at] = (linear ? sum >> 8 : sum) - p.sums[token + t];
        }
    }
}

/// All rows of the list with some tokens.
template <class V, bool gaps, int most>
void listed_rows(const LineProduct& p, int token, int tokens) {
    if constexpr (most > 1)
        if (tokens < most) return listed_rows<V, gaps, most - 1>(p, token, tokens);
    const int share = (p.count + rows_together(most) - 1) / rows_together(most);
    for (int at = 0; at < share; ++at) rows_product<V, gaps, most>(p, share, at, token);
}

template <class V, bool gaps>
void multiply_panels(const LineProduct& p) {
    constexpr int kPanel = 64;  // with many tokens, so many rows stay in cache
    const int groups = (p.tokens + V::kRowTokens - 1) / V::kRowTokens, panel = groups == 1 ? p.count : kPanel;
    LineProduct part = p;
    for (int begin = 0; begin < p.count; begin += panel) {
        part.list = p.list + begin;
        part.out = p.out + begin;
        part.count = p.count - begin < panel ? p.count - begin : panel;
        for (int g = 0; g < groups; ++g) {
            const int token = p.tokens * g / groups;
            listed_rows<V, gaps, V::kRowTokens>(part, token, p.tokens * (g + 1) / groups - token);
        }
    }
}

template <class V>
void multiply_rows(const LineProduct& p) {
    if (p.count == 0) return;
    const int span = p.list[p.count - 1] - p.list[0] + 1;
    p.count < span - span / 8 ? multiply_panels<V, true>(p) : multiply_panels<V, false>(p);
}

// --- Columns. With a list, trits are not taken out: of each of the five fields, and of what is left behind the
// last one, there is a sum of its own. They wait in memory, [token][line][6][4 vectors], while other lines are added.

constexpr int kLineSums = kLineFields + 1;
constexpr int kLineInts = kLineSums * 64;

/// A group of columns, their activations, and those that come next.
struct ColumnGroup {
    const uint8_t* columns[kColumnGroup];
    const uint8_t* next[kColumnGroup];
    int8_t x[kLineTokens][kColumnGroup];
};

/// Adds a group of columns to the sums of one line. fetches: the same line of those that come next is prefetched.
template <class V, bool fetches>
void add_group_line(const ColumnGroup& group, const int8_t* x, ptrdiff_t offset, int32_t* memory) {
    typename V::Ints sums[kLineSums][4];
#pragma GCC unroll 8
    for (int f = 0; f < kLineSums; ++f)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[f][i] = V::load32(memory + 64 * f + 16 * i);
    for (int g = 0; g < kColumnGroup; g += 4) {
        typename V::Bytes four[4], q[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            if constexpr (fetches) __builtin_prefetch(group.next[g + i] + offset);
            four[i] = V::load(group.columns[g + i] + offset);
        }
        V::template interleave<false>(four, q[0], q[1]);
        V::template interleave<true>(four, q[2], q[3]);
        const auto x4 = V::broadcast4(x + g, 0);
#pragma GCC unroll 8
        for (int f = 0; f < kLineSums; ++f)
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                sums[f][i] = V::template dot<255>(sums[f][i], q[i], x4);
                if (f < kLineFields) q[i] = V::add(q[i], V::add(q[i], q[i]));
            }
    }
#pragma GCC unroll 8
    for (int f = 0; f < kLineSums; ++f)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) V::store(memory + 64 * f + 16 * i, sums[f][i]);
}

/// The result of one line from its sums. offset: the sum of the activations.
template <class V>
void finish_line(const int32_t* memory, int32_t offset, int32_t* out) {
    for (int i = 0; i < kLineFields * 64; i += 16) {
        const auto sum = V::load32(memory + i);
        const auto three = V::plus(sum, V::plus(sum, sum));
        V::store(out + i,
                 V::minus(V::shift_right32(V::minus(three, V::load32(memory + i + 64)), 8), V::splat32(offset)));
    }
}

/// A group of columns at a time, all lines of them. Behind the end the last column stands in, times 0.
template <class V>
void add_columns(const LineProduct& p) {
    int32_t* memory = reinterpret_cast<int32_t*>(p.scratch);
    for (ptrdiff_t i = 0; i < ptrdiff_t{p.tokens} * p.lines * kLineInts; i += 16) V::store(memory + i, V::splat32(0));
    int32_t offsets[kLineTokens] = {};
    for (int at = 0; at < p.count; at += kColumnGroup) {
        ColumnGroup group;
        for (int i = 0; i < kColumnGroup; ++i) {
            const int column = p.list[at + i < p.count ? at + i : p.count - 1], then = at + i + kColumnGroup;
            group.columns[i] = p.weights + column * p.stride;
            group.next[i] = p.weights + p.list[then < p.count ? then : p.count - 1] * p.stride;
            for (int t = 0; t < p.tokens; ++t)
                offsets[t] += group.x[t][i] =
                    at + i < p.count ? p.codes[t * p.code_stride + column] : static_cast<int8_t>(0);
        }
        for (int t = 0; t < p.tokens; ++t)
            for (int line = 0; line < p.lines; ++line) {
                int32_t* sums = memory + (t * p.lines + line) * kLineInts;
                if (t == 0)
                    add_group_line<V, true>(group, group.x[t], line * kBlockBytes, sums);
                else
                    add_group_line<V, false>(group, group.x[t], line * kBlockBytes, sums);
            }
    }
    for (int t = 0; t < p.tokens; ++t)
        for (int line = 0; line < p.lines; ++line)
            finish_line<V>(memory + (t * p.lines + line) * kLineInts, offsets[t],
                           p.out + t * p.out_stride + line * kLineEntries);
}

/// Unpacks one line of some columns, a multiple of four, to tiles of T16-8. Behind the last column there is any.
template <class V>
void unpack_columns(const LineProduct& p, int begin, int count, int line, uint8_t* panel) {
    const ptrdiff_t tile = count / 4 * kBlockBytes;
    const uint8_t* weights = p.weights + line * kBlockBytes;
    for (int i = begin; i < begin + count; i += 4, panel += kBlockBytes) {
        typename V::Bytes four[4], q[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const int last = p.count - 1, then = i + j + 32;
            four[j] = V::load(weights + (i + j < last ? i + j : last) * p.stride);
            __builtin_prefetch(weights + (then < last ? then : last) * p.stride);
        }
        V::template interleave<false>(four, q[0], q[1]);
        V::template interleave<true>(four, q[2], q[3]);
#pragma GCC unroll 8
        for (int f = 0; f < kLineFields; ++f)
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) V::store_bytes(panel + (4 * f + j) * tile, Trits::take<V>(q[j]));
    }
}

/// Many tokens: a line of some columns at a time is unpacked, which stays in cache for all tokens.
template <class V>
void multiply_columns(const LineProduct& p) {
    TileProduct q{};
    q.weights = p.scratch;
    q.tile_end = kLineEntries / kTileRows;
    q.code_stride = p.code_stride;
    q.sums = p.sums;
    q.tokens = p.tokens;
    q.out_stride = p.out_stride;
    for (int line = 0; line < p.lines; ++line)
        for (int at = 0; at < p.count; at += kLinePanel) {
            const int left = p.count - at, count = left < kLinePanel ? (left + 3) / 4 * 4 : kLinePanel;
            unpack_columns<V>(p, at, count, line, p.scratch);
            q.blocks = count / 4;
            q.codes = p.codes + at;
            q.out = p.out + line * kLineEntries;
            q.accumulate = at > 0;
            q.offset = at == 0 ? 1 : 0;
            matmul_tiles<V, Bits<8, 2>>(q);
        }
}

// The products of T16 tiles (kernels.h has the layouts) with int8 activations, written once over the vectors V of an
// instruction set. Included inside the region and the anonymous namespace of an isa_*.cpp, after its V.
//
//   one block of a tile, 64 bytes              a vector of activations
//   | row 0   | row 1   | ... | row 15  |      | x[k..k+3] | x[k..k+3] | ... |     one load, broadcast
//   | 4 bytes | 4 bytes |     | 4 bytes |
//   code of column k + j in byte j (field f of the byte: column k + 4f + j), so dot() adds 4 products to each row's
//   sum.
//
// V has: Bytes, Ints, Four; kBytes; load, splat, both (and), add (bytes), shift_right<n>, trit; broadcast4(x, f), the
// activations of field f; splat32, plus, minus, shift_left, shift_right32, store; dot<largest code>, whose sums begin
// with start<largest code>(sum of the activations); and, where int16 sums must be widened, Narrow, dot_narrow, widen.
// Its constants: kUnsignedDot, codes up to 255 cost dot nothing more; kByteShifts, shift_right shifts bytes, not
// words; places<bits>, how many fields are used in place with one token; the others say how many tokens and tiles fit
// into its registers.

/// Codes of `bits` bits, fields from the lowest bits up. largest: the largest code that occurs; steps: about how many
/// instructions take() is.
template <int bits, int largest_code = (1 << bits) - 1>
struct Bits {
    static constexpr int fields = 8 / bits, columns = 4 * fields, largest = largest_code, steps = 2;

    /// The codes of the lowest field; the next field moves down.
    template <class V>
    TRITKIT_INLINE typename V::Bytes take(typename V::Bytes& v) {
        if constexpr (bits == 8) {
            return v;
        } else {
            const auto codes = V::both(v, V::splat(static_cast<uint8_t>((1 << bits) - 1)));
            v = V::template shift_right<bits>(v);
            return codes;
        }
    }
};

/// Five trits in a byte, q = ceil(256 / 243 * sum of t_f 3^(4-f)): the first is (3 q) >> 8, and 3 q mod 256 holds the
/// rest in the same way.
struct Trits {
    static constexpr int fields = 5, columns = 20, largest = 2, steps = 7;

    template <class V>
    TRITKIT_INLINE typename V::Bytes take(typename V::Bytes& v) {
        const auto codes = V::trit(v);
        v = V::add(v, V::add(v, v));
        return codes;
    }
};

template <class V>
constexpr int kParts = kBlockBytes / V::kBytes;

/// Where the parts (vectors) of some tiles are: tile, tile + distance, ...
template <class V, int vectors>
TRITKIT_INLINE void locate(const TileProduct& p, int tile, int distance, const uint8_t* (&w)[vectors]) {
    for (int i = 0; i < vectors; ++i)
        w[i] = p.weights + static_cast<ptrdiff_t>(tile + i / kParts<V> * distance) * p.blocks * kBlockBytes +
               i % kParts<V> * V::kBytes;
}

template <class V, int vectors>
TRITKIT_INLINE void load_block(const uint8_t* (&w)[vectors], typename V::Bytes (&v)[vectors]) {
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) {
        if (i % kParts<V> == 0) __builtin_prefetch(w[i] + kAhead);
        v[i] = V::load(w[i]);
        w[i] += kBlockBytes;
    }
}

/// weight = multiplier * code - offset
template <class V>
TRITKIT_INLINE void store_sum(const TileProduct& p, int tile, int part, int token, typename V::Ints sum) {
    int32_t* out =
        p.out + token * p.out_stride + (tile - p.tile_begin) * kTileRows + part * static_cast<int>(V::kBytes / 4);
    sum = V::minus(V::shift_left(sum, p.shift), V::splat32(p.offset * p.sums[token]));
    V::store(out, p.accumulate ? V::plus(sum, V::load32(out)) : sum);
}

template <int m, int n, class Sum>
TRITKIT_INLINE void clear(Sum (&sums)[m][n], Sum start) {
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < n; ++j) sums[i][j] = start;
}

/// Adds the products of some blocks to the sums. Every field is taken out of its byte once, for all the tokens.
template <class V, class Codes, bool narrow, int tokens, int vectors, class Sum>
TRITKIT_INLINE void add_blocks(Sum (&sums)[tokens][vectors], const uint8_t* (&w)[vectors], const int8_t* x,
                               ptrdiff_t stride, int blocks) {
    for (int b = 0; b < blocks; ++b, x += Codes::columns) {
        typename V::Bytes v[vectors];
        load_block<V>(w, v);
#pragma GCC unroll 8
        for (int f = 0; f < Codes::fields; ++f) {
            typename V::Bytes codes[vectors];
#pragma GCC unroll 8
            for (int i = 0; i < vectors; ++i) codes[i] = Codes::template take<V>(v[i]);
#pragma GCC unroll 8
            for (int t = 0; t < tokens; ++t) {
                const auto four = V::broadcast4(x + t * stride, f);
#pragma GCC unroll 8
                for (int i = 0; i < vectors; ++i) {
                    if constexpr (narrow)
                        sums[t][i] = V::dot_narrow(sums[t][i], codes[i], four);
                    else
                        sums[t][i] = V::template dot<Codes::largest>(sums[t][i], codes[i], four);
                }
            }
        }
    }
}

/// Products of `tokens` tokens, from `token` on, with `tiles` tiles.
template <class V, class Codes, int tokens, int tiles>
void block_product(const TileProduct& p, int tile, int distance, int token) {
    constexpr int vectors = tiles * kParts<V>;
    const int8_t* x = p.codes + token * p.code_stride;
    const uint8_t* w[vectors];
    locate<V>(p, tile, distance, w);
    typename V::Ints sums[tokens][vectors];
    for (int t = 0; t < tokens; ++t)
        for (int i = 0; i < vectors; ++i) sums[t][i] = V::template start<Codes::largest>(p.sums[token + t]);
    if constexpr (V::template narrow<Codes::largest>()) {
        // A pair of products is at most 2 * 128 * largest, and -32768 still is an int16.
        constexpr int most = 32768 / (Codes::fields * 256 * Codes::largest);
        for (int b = 0; b < p.blocks; b += most) {
            typename V::Narrow part[tokens][vectors];
            clear(part, V::narrow_zero());
            const int blocks = b + most < p.blocks ? most : p.blocks - b;
            add_blocks<V, Codes, true>(part, w, x + static_cast<ptrdiff_t>(b) * Codes::columns, p.code_stride, blocks);
#pragma GCC unroll 8
            for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 8
                for (int i = 0; i < vectors; ++i) sums[t][i] = V::widen(sums[t][i], part[t][i]);
        }
    } else {
        add_blocks<V, Codes, false>(sums, w, x, p.code_stride, p.blocks);
    }
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 8
        for (int i = 0; i < vectors; ++i)
            store_sum<V>(p, tile + i / kParts<V> * distance, i % kParts<V>, token + t, sums[t][i]);
}

/// Adds the products of some blocks with one token. A field that stays where it is in its byte needs no shift, but
/// has a sum of its own, too large by 2^(bits * place).
template <class V, int bits, bool narrow, int places, int vectors, class Sum>
TRITKIT_INLINE void add_in_place(Sum (&sums)[vectors][places], const uint8_t* (&w)[vectors], const int8_t* x,
                                 int blocks) {
    constexpr int fields = 8 / bits, largest = ((1 << bits) - 1) << (bits * (places - 1));
    for (int b = 0; b < blocks; ++b, x += 4 * fields) {
        typename V::Bytes v[vectors];
        load_block<V>(w, v);
#pragma GCC unroll 8
        for (int f = 0; f < fields; ++f) {
            const int place = f % places;
            const auto four = V::broadcast4(x, f);
            const auto mask = V::splat(static_cast<uint8_t>(((1 << bits) - 1) << (bits * place)));
            const bool alone = bits == 8 || (V::kByteShifts && place == 0 && f == fields - 1);
#pragma GCC unroll 8
            for (int i = 0; i < vectors; ++i) {
                if (f && place == 0) v[i] = V::template shift_right<bits * places % 8>(v[i]);
                const auto codes = alone ? v[i] : V::both(v[i], mask);
                if constexpr (narrow)
                    sums[i][place] = V::dot_narrow(sums[i][place], codes, four);
                else
                    sums[i][place] = V::template dot<largest>(sums[i][place], codes, four);
            }
        }
    }
}

/// One token, with most fields in place: two instructions for kBytes weights.
template <class V, int tiles, int bits, int largest>
void one_token(const TileProduct& p, int tile, int distance, int token, Bits<bits, largest>) {
    constexpr int fields = 8 / bits, vectors = tiles * kParts<V>, places = V::template places<bits>();
    const int8_t* x = p.codes + token * p.code_stride;
    const uint8_t* w[vectors];
    locate<V>(p, tile, distance, w);
    typename V::Ints sums[vectors][places];
    clear(sums, V::template start<bits == 8 ? 255 : 0>(p.sums[token]));
    if constexpr (V::template narrow<largest>()) {
        constexpr int most = 32768 / ((fields + places - 1) / places * 256 * (largest << (bits * (places - 1))));
        for (int b = 0; b < p.blocks; b += most) {
            typename V::Narrow part[vectors][places];
            clear(part, V::narrow_zero());
            const int blocks = b + most < p.blocks ? most : p.blocks - b;
            add_in_place<V, bits, true>(part, w, x + static_cast<ptrdiff_t>(b) * 4 * fields, blocks);
#pragma GCC unroll 8
            for (int i = 0; i < vectors; ++i)
#pragma GCC unroll 8
                for (int f = 0; f < places; ++f) sums[i][f] = V::widen(sums[i][f], part[i][f]);
        }
    } else {
        add_in_place<V, bits, false>(sums, w, x, p.blocks);
    }
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) {
        auto sum = sums[i][0];
#pragma GCC unroll 8
        for (int f = 1; f < places; ++f) sum = V::plus(sum, V::shift_right32(sums[i][f], bits * f));
        store_sum<V>(p, tile + i / kParts<V> * distance, i % kParts<V>, token, sum);
    }
}

/// One token with trits, none of which is ever taken out: with q' = 3 q mod 256 the trit is (3 q - q') / 256 exactly,
/// so the sum of t x is (3 sum of q x - sum of q' x) / 256. Intermediate sums may wrap, the difference does not:
/// |3 D - E| <= 256 * 2 * 128 * columns < 2^31 for columns < 32768.
template <class V, int tiles>
void one_token(const TileProduct& p, int tile, int distance, int token, Trits) {
    if constexpr (!V::kUnsignedDot) return block_product<V, Trits, 1, tiles>(p, tile, distance, token);
    constexpr int vectors = tiles * kParts<V>;
    const int8_t* x = p.codes + token * p.code_stride;
    const uint8_t* w[vectors];
    locate<V>(p, tile, distance, w);
    typename V::Ints d[vectors], e[vectors];
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) d[i] = e[i] = V::template start<255>(p.sums[token]);
    for (int b = 0; b < p.blocks; ++b, x += Trits::columns) {
        typename V::Bytes q[vectors];
        load_block<V>(w, q);
#pragma GCC unroll 8
        for (int f = 0; f < Trits::fields; ++f) {
            const auto four = V::broadcast4(x, f);
#pragma GCC unroll 8
            for (int i = 0; i < vectors; ++i) {
                d[i] = V::template dot<255>(d[i], q[i], four);
                q[i] = V::add(q[i], V::add(q[i], q[i]));
                e[i] = V::template dot<255>(e[i], q[i], four);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) {
        const auto three = V::plus(d[i], V::plus(d[i], d[i]));
        store_sum<V>(p, tile + i / kParts<V> * distance, i % kParts<V>, token,
                     V::shift_right32(V::minus(three, e[i]), 8));
    }
}

/// block_product with a number of tokens that is known only now, at most `most`.
template <class V, class Codes, int most, int tiles>
void some_tokens(const TileProduct& p, int tile, int distance, int token, int tokens) {
    if constexpr (most > 1) {
        if (tokens < most)
            some_tokens<V, Codes, most - 1, tiles>(p, tile, distance, token, tokens);
        else
            block_product<V, Codes, most, tiles>(p, tile, distance, token);
    } else {
        one_token<V, tiles>(p, tile, distance, token, Codes{});
    }
}

/// All tiles from `tile` to `end`, `streams` of them at the same time, far apart, since long streams use the memory
/// best; with each of them all tokens, in groups of about the same size.
template <class V, class Codes, int most, int streams>
void tile_streams(const TileProduct& p, int tile, int end) {
    const int distance = (end - tile) / streams, groups = (p.tokens + most - 1) / most;
    for (int i = 0; i < distance; ++i) {
        for (int g = 0; g < groups; ++g) {
            const int token = p.tokens * g / groups;
            some_tokens<V, Codes, most, streams>(p, tile + i, distance, token, p.tokens * (g + 1) / groups - token);
        }
    }
    if constexpr (streams > 1)
        if (tile + streams * distance < end)
            tile_streams<V, Codes, most, streams / 2>(p, tile + streams * distance, end);
}

/// Unpacks a tile to blocks of T16-8: [columns / 4][64 bytes].
template <class V, class Codes>
void unpack_tile(const uint8_t* w, int blocks, uint8_t* out) {
    for (int b = 0; b < blocks; ++b, w += kBlockBytes, out += Codes::fields * kBlockBytes) {
        __builtin_prefetch(w + kAhead);
#pragma GCC unroll 4
        for (int part = 0; part < kParts<V>; ++part) {
            auto v = V::load(w + part * V::kBytes);
#pragma GCC unroll 8
            for (int f = 0; f < Codes::fields; ++f)
                V::store_bytes(out + f * kBlockBytes + part * V::kBytes, Codes::template take<V>(v));
        }
    }
}

/// Many tokens: a few tiles at a time are unpacked to bytes, which stay in cache for all the tokens.
template <class V, class Codes>
void panel_product(const TileProduct& p) {
    const int panel_blocks = p.blocks * Codes::fields;
    for (int tile = p.tile_begin; tile < p.tile_end; tile += V::kPanelTiles) {
        const int tiles = tile + V::kPanelTiles < p.tile_end ? V::kPanelTiles : p.tile_end - tile;
        for (int i = 0; i < tiles; ++i)
            unpack_tile<V, Codes>(p.weights + static_cast<ptrdiff_t>(tile + i) * p.blocks * kBlockBytes, p.blocks,
                                  p.panel + static_cast<ptrdiff_t>(i) * panel_blocks * kBlockBytes);
        TileProduct q = p;
        q.weights = p.panel;
        q.blocks = panel_blocks;
        q.tile_begin = 0;
        q.tile_end = tiles;
        q.out = p.out + (tile - p.tile_begin) * kTileRows;
        tile_streams<V, Bits<8, Codes::largest>, V::kPanelTokens, V::kPanelTiles>(q, 0, tiles);
    }
}

template <class V, class Codes>
void matmul_tiles(const TileProduct& p) {
    if (p.tokens == 1)
        tile_streams<V, Codes, 1, V::kStreams>(p, p.tile_begin, p.tile_end);
    else if (p.tokens <= V::kFewTokens)
        tile_streams<V, Codes, V::kFewTokens, V::kFewTiles>(p, p.tile_begin, p.tile_end);
    else if (Codes::fields == 1)
        tile_streams<V, Codes, V::kPanelTokens, V::kPanelTiles>(p, p.tile_begin, p.tile_end);
    else if (p.tokens * Codes::steps < V::kPanelFrom || !p.panel)
        tile_streams<V, Codes, V::kGroupTokens, V::kGroupTiles>(p, p.tile_begin, p.tile_end);
    else
        panel_product<V, Codes>(p);
}

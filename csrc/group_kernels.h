// The products of grouped weights (group_layout.h) with int8 activations in groups, written once over the vectors V of
// an instruction set. Included inside the region and the anonymous namespace of an isa_*.cpp, after tile_kernels.h.
//
// As in tile_kernels.h one broadcast of four activation codes feeds the 16 rows of a tile. 32 columns are 8 quads:
//
//   strip of 32 columns in a stream       low plane         high plane       codes of quad q
//   | block | block | ... | block |  ->   field q         | field q      ->  16 rows x 4 columns, unsigned bytes
//
// Scales and offsets of a span become floats in the first cache, one row of 16 for each unit, so that the products need
// not know in which of many forms they are stored. The sums of a unit are integers; each is multiplied by its scales
// and added to a float sum of the row, in the order of the columns, whatever the number of tokens or tiles.
//
// V has, besides what tile_kernels.h says: Floats; shift_left<n>, merge (a | (b & mask)), load_table, lookup;
// no_floats, load_floats, store_floats, splat_floats, halves, int8s, uint8s, to_floats, times, subtract, fma.

constexpr int kPanelTokens = 16;  // from so many on a span of all tiles is worked on at a time

struct SpanScales {
    alignas(64) float scales[kSpanColumns / kGroupUnit][kTileRows];
    alignas(64) float offsets[kSpanColumns / kGroupUnit][kTileRows];
};

/// Integers of low_bits + high_bits bits. take() gives the codes of quads 0, 1 ... 7 in turn.
template <int low_bits, int high_bits>
struct Planes {
    static constexpr int blocks = low_bits + high_bits, passes = 1, largest = (1 << blocks) - 1;
    static constexpr bool has_table = false;

    template <class V>
    struct Reader {
        typename V::Bytes low, high;
    };

    template <class V>
    TRITKIT_INLINE typename V::Bytes take(Reader<V>& r, const uint8_t* strip, int quad, typename V::Bytes) {
        constexpr int fields = 8 / low_bits;
        if (quad % fields == 0) r.low = V::load(strip + quad / fields * kBlockBytes);
        auto codes = r.low;
        if constexpr (low_bits < 8) {
            codes = V::both(codes, V::splat(static_cast<uint8_t>((1 << low_bits) - 1)));
            r.low = V::template shift_right<low_bits>(r.low);
        }
        if constexpr (high_bits > 0) {
            // The field's bits go to where the low ones end. Shifts of a half of the fields at a time never bring them
            // across the border of a byte.
            constexpr int high_fields = 8 / high_bits, field = ((1 << high_bits) - 1) << low_bits;
            const uint8_t* block = strip + (low_bits + quad / high_fields) * kBlockBytes;
            if (quad % high_fields == 0)
                r.high = V::template shift_left<low_bits>(V::load(block));
            else if (quad % high_fields == high_fields / 2)
                r.high = V::template shift_right<4 - low_bits>(V::load(block));
            else
                r.high = V::template shift_right<high_bits>(r.high);
            codes = V::merge(codes, r.high, V::splat(static_cast<uint8_t>(field)));
        }
        return codes;
    }
};

/// Codes of 4 bits that look up numbers of so many bytes. The first pass takes the high bytes.
template <int bytes>
struct Table {
    static constexpr int blocks = 4, passes = bytes, largest = 255;
    static constexpr bool has_table = true;

    template <class V>
    using Reader = Planes<4, 0>::Reader<V>;

    template <class V>
    TRITKIT_INLINE typename V::Bytes take(Reader<V>& r, const uint8_t* strip, int quad, typename V::Bytes table) {
        return V::lookup(table, Planes<4, 0>::take<V>(r, strip, quad, table));
    }
};

template <class V>
TRITKIT_INLINE typename V::Floats group_scale(GroupScales form, const uint8_t* at, int lane, typename V::Floats d) {
    switch (form) {
        case GroupScales::kHalf:
            return V::halves(at + 2 * lane);
        case GroupScales::kFloat:
            return V::load_floats(reinterpret_cast<const float*>(at) + lane);
        case GroupScales::kTwoLevel:
            return V::times(d, V::int8s(at + lane));
        default:
            return V::times(d, V::nibbles(at + lane, 0));
    }
}

template <class V>
TRITKIT_INLINE typename V::Floats group_offset(const GroupLayout& g, const uint8_t* at, int lane,
                                               typename V::Floats scale, typename V::Floats dmin) {
    switch (g.offsets) {
        case GroupOffsets::kHalf:
            return V::halves(at + 2 * lane);
        case GroupOffsets::kFloat:
            return V::load_floats(reinterpret_cast<const float*>(at) + lane);
        case GroupOffsets::kZeros:
            return V::subtract(V::no_floats(), V::times(scale, V::uint8s(at + lane)));
        default:
            return V::subtract(
                V::no_floats(),
                V::times(dmin, g.scales == GroupScales::kTwoLevel4 ? V::nibbles(at + lane, 4) : V::uint8s(at + lane)));
    }
}

/// The scales and offsets of the units of a span, as floats; `s` still holds those of the span before. Returns where
/// the codes begin.
template <class V, int unit>
const uint8_t* read_scales(const GroupLayout& g, const uint8_t* header, int begin, int end, SpanScales& s) {
    constexpr int lanes = V::kBytes / 4;
    const int bytes = g.header_bytes(begin, end);
    for (int b = 0; b < bytes; b += kBlockBytes) __builtin_prefetch(header + b + kAhead);
    const uint8_t* at = header + 32 * g.has_d() + 32 * g.has_dmin();
    const int offset_at = g.scales == GroupScales::kTwoLevel4 ? 0 : g.scale_bytes(),
              step = g.scale_bytes() + g.offset_bytes();
    int left = (g.group - begin % g.group) % g.group;  // columns of the group that began before
    const float *last_scales = s.scales[kSpanColumns / unit - 1], *last_offsets = s.offsets[kSpanColumns / unit - 1];
    for (int u = 0; u < (end - begin) / unit; ++u, left -= unit) {
        const bool first = left == 0;
#pragma GCC unroll 4
        for (int lane = 0; lane < kTileRows; lane += lanes) {
            const auto scale = first ? group_scale<V>(g.scales, at, lane, V::halves(header + 2 * lane))
                                     : V::load_floats(last_scales + lane);
            V::store_floats(s.scales[u] + lane, scale);
            if (g.offsets == GroupOffsets::kNone) continue;
            V::store_floats(s.offsets[u] + lane, first ? group_offset<V>(g, at + offset_at, lane, scale,
                                                                         V::halves(header + 32 * g.has_d() + 2 * lane))
                                                       : V::load_floats(last_offsets + lane));
        }
        if (first) {
            at += step;
            left = g.group;
        }
        last_scales = s.scales[u];
        last_offsets = s.offsets[u];
    }
    return header + bytes;
}

/// Adds the integer products of `quads` quads from `quad` on.
template <class V, class Codes, int quads, int tokens, int vectors, class Sum>
TRITKIT_INLINE void add_quads(Sum (&sums)[tokens][vectors], typename Codes::template Reader<V> (&readers)[vectors],
                              const uint8_t* const (&strips)[vectors], const ActivationStrip* x, ptrdiff_t stride,
                              int quad, typename V::Bytes table) {
    constexpr bool narrow = V::template narrow<Codes::largest>();
#pragma GCC unroll 8
    for (int q = quad; q < quad + quads; ++q) {
        typename V::Bytes codes[vectors];
#pragma GCC unroll 8
        for (int i = 0; i < vectors; ++i) codes[i] = Codes::template take<V>(readers[i], strips[i], q, table);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; ++t) {
            const auto four = V::broadcast4(x[t * stride].codes, q);
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

/// The same for a whole unit; where int16 sums would overflow before its end they are widened on the way.
template <class V, class Codes, int unit, int tokens, int vectors>
TRITKIT_INLINE void add_unit(typename V::Ints (&sums)[tokens][vectors],
                             typename Codes::template Reader<V> (&readers)[vectors],
                             const uint8_t* const (&strips)[vectors], const ActivationStrip* x, ptrdiff_t stride,
                             int quad, typename V::Bytes table) {
    constexpr int quads = unit / 4;
    if constexpr (V::template narrow<Codes::largest>()) {
        constexpr int fit = 32768 / (256 * Codes::largest), most = fit < quads ? fit / 2 * 2 : quads;
#pragma GCC unroll 8
        for (int q = 0; q < quads; q += most) {
            typename V::Narrow part[tokens][vectors];
            clear(part, V::narrow_zero());
            add_quads<V, Codes, most>(part, readers, strips, x, stride, quad + q, table);
#pragma GCC unroll 8
            for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 8
                for (int i = 0; i < vectors; ++i) sums[t][i] = V::widen(sums[t][i], part[t][i]);
        }
    } else {
        add_quads<V, Codes, quads>(sums, readers, strips, x, stride, quad, table);
    }
}

/// The columns begin .. end - 1 of some tiles: where their codes are, and their scales.
template <int tiles>
struct TileSpans {
    int begin, end;
    const uint8_t* codes[tiles];
    SpanScales scales[tiles];
};

/// Adds the products of a span of `tiles` tiles, tile, tile + distance ..., with `tokens` tokens from `token` on.
template <class V, class Codes, int unit, int tokens, int tiles>
void span_product(const GroupProduct& p, const TileSpans<tiles>& s, int tile, int distance, int token) {
    constexpr int parts = kParts<V>, vectors = tiles * parts, lanes = V::kBytes / 4;
    const ptrdiff_t stride = p.x_stride;
    const ActivationStrip* x = p.x + token * stride + s.begin / kStripColumns;
    float* const out = p.out + token * p.out_stride + (tile - p.tile_begin) * kTileRows;
    typename V::Bytes tables[Codes::passes];
    for (int pass = 0; pass < Codes::passes; ++pass)
        tables[pass] = Codes::has_table ? V::load_table(p.table + 16 * pass) : V::splat(0);
    const uint8_t* w[vectors];
    typename V::Floats sums[tokens][vectors];
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) {
        w[i] = s.codes[i / parts] + i % parts * V::kBytes;
#pragma GCC unroll 8
        for (int t = 0; t < tokens; ++t)
            sums[t][i] =
                s.begin ? V::load_floats(out + t * p.out_stride + i / parts * distance * kTileRows + i % parts * lanes)
                        : V::no_floats();
    }
    const auto scale_of = [&](const auto& floats, int i, int u) {
        return V::load_floats(floats[u] + i % parts * lanes);
    };
    for (int k = s.begin; k < s.end; k += kStripColumns, ++x) {
        typename Codes::template Reader<V> readers[vectors];
#pragma GCC unroll 2
        for (int half = 0; half < kStripColumns / unit; ++half) {
            const int u = (k - s.begin) / unit + half, part = unit == kStripColumns ? 2 : half;  // of the strip
            typename V::Ints products[tokens][vectors];
#pragma GCC unroll 8
            for (int t = 0; t < tokens; ++t) {
                const int32_t* starts = x[t * stride].starts;
                const auto start =
                    V::plus(V::shift_left(V::splat32(starts[p.bias_bits < 0 ? 3 : part]), p.bias_bits & 31),
                            V::template start<Codes::largest>(-starts[part]));
#pragma GCC unroll 8
                for (int i = 0; i < vectors; ++i) products[t][i] = start;
            }
#pragma GCC unroll 2
            for (int pass = 0; pass < Codes::passes; ++pass) {
                if (pass)
#pragma GCC unroll 8
                    for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 8
                        for (int i = 0; i < vectors; ++i)
                            products[t][i] = V::plus(V::shift_left(products[t][i], 8),
                                                     V::template start<Codes::largest>(-x[t * stride].starts[part]));
                add_unit<V, Codes, unit>(products, readers, w, x, stride, half * unit / 4, tables[pass]);
            }
#pragma GCC unroll 8
            for (int i = 0; i < vectors; ++i) {
                const auto scale = scale_of(s.scales[i / parts].scales, i, u);
#pragma GCC unroll 8
                for (int t = 0; t < tokens; ++t)
                    sums[t][i] = V::fma(V::times(V::to_floats(products[t][i]), scale),
                                        V::splat_floats(x[t * stride].scale), sums[t][i]);
            }
            if (p.layout.offsets != GroupOffsets::kNone) {
#pragma GCC unroll 8
                for (int i = 0; i < vectors; ++i) {
                    const auto offset = scale_of(s.scales[i / parts].offsets, i, u);
#pragma GCC unroll 8
                    for (int t = 0; t < tokens; ++t)
                        sums[t][i] = V::fma(offset, V::splat_floats(x[t * stride].moments[part]), sums[t][i]);
                }
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < vectors; ++i) {
            if (tokens == 1 && i % parts == 0)
#pragma GCC unroll 8
                for (int b = 0; b < Codes::blocks; ++b) __builtin_prefetch(w[i] + b * kBlockBytes + kAhead);
            w[i] += Codes::blocks * kBlockBytes;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i)
#pragma GCC unroll 8
        for (int t = 0; t < tokens; ++t)
            V::store_floats(out + t * p.out_stride + i / parts * distance * kTileRows + i % parts * lanes, sums[t][i]);
}

/// span_product with a number of tokens that is known only now, at most `most`.
template <class V, class Codes, int unit, int most, int tiles>
TRITKIT_INLINE void span_tokens(const GroupProduct& p, const TileSpans<tiles>& s, int tile, int distance, int token,
                                int tokens) {
    if constexpr (most > 1) {
        if (tokens < most) {
            span_tokens<V, Codes, unit, most - 1, tiles>(p, s, tile, distance, token, tokens);
            return;
        }
    }
    span_product<V, Codes, unit, most, tiles>(p, s, tile, distance, token);
}

/// All tiles from `tile` to `end`, `streams` of them at the same time and far apart; with each span of theirs all
/// tokens, in groups of about the same size. Few tokens: a tile is read from its begin to its end. Many: a span of all
/// tiles at a time, so that the activations of that span stay in cache.
template <class V, class Codes, int unit, int most, int streams>
void group_streams(const GroupProduct& p, int tile, int end) {
    const GroupLayout& g = p.layout;
    const ptrdiff_t tile_bytes = g.tile_bytes();
    const int distance = (end - tile) / streams, groups = (p.tokens + most - 1) / most;
    // A group that goes on into the next span is known only to who has read the span before.
    const int panel = p.tokens >= kPanelTokens && kSpanColumns % g.group == 0 ? distance : 1;
    TileSpans<streams> s;
    for (int first = tile; first < tile + distance; first += panel) {
        const uint8_t* span = p.weights + first * tile_bytes;  // of the first tile
        for (s.begin = 0; s.begin < g.columns; s.begin = s.end) {
            s.end = g.span_end(s.begin);
            for (int i = first; i < first + panel; ++i) {
                for (int j = 0; j < streams; ++j)
                    s.codes[j] = read_scales<V, unit>(g, span + (i - first + j * distance) * tile_bytes, s.begin, s.end,
                                                      s.scales[j]);
                for (int n = 0; n < groups; ++n) {
                    const int token = p.tokens * n / groups, tokens = p.tokens * (n + 1) / groups - token;
                    span_tokens<V, Codes, unit, most, streams>(p, s, i, distance, token, tokens);
                }
            }
            span += g.header_bytes(s.begin, s.end) + (s.end - s.begin) / kStripColumns * Codes::blocks * kBlockBytes;
        }
    }
    if constexpr (streams > 1) group_streams<V, Codes, unit, most, streams / 2>(p, tile + streams * distance, end);
}

template <class V, class Codes, int unit>
void group_product(const GroupProduct& p) {
    if (p.tokens == 1)
        group_streams<V, Codes, unit, 1, V::kSpanStreams>(p, p.tile_begin, p.tile_end);
    else
        group_streams<V, Codes, unit, V::kSpanTokens, V::kSpanTiles>(p, p.tile_begin, p.tile_end);
}

template <class V, class Codes>
void group_product(const GroupProduct& p) {
    p.layout.unit() == kGroupUnit ? group_product<V, Codes, kGroupUnit>(p) : group_product<V, Codes, kStripColumns>(p);
}

template <class V>
void matmul_groups(const GroupProduct& p) {
    switch (p.layout.codes) {
        case GroupCodes::k2:
            return group_product<V, Planes<2, 0>>(p);
        case GroupCodes::k3:
            return group_product<V, Planes<2, 1>>(p);
        case GroupCodes::k4:
            return group_product<V, Planes<4, 0>>(p);
        case GroupCodes::k5:
            return group_product<V, Planes<4, 1>>(p);
        case GroupCodes::k6:
            return group_product<V, Planes<4, 2>>(p);
        case GroupCodes::k8:
            return group_product<V, Planes<8, 0>>(p);
        case GroupCodes::kTable8:
            return group_product<V, Table<1>>(p);
        case GroupCodes::kTable16:
            return group_product<V, Table<2>>(p);
    }
}

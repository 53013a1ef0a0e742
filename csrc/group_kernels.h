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

struct SpanScales {
    alignas(64) float scales[kSpanColumns / kGroupUnit][kTileRows];
    alignas(64) float offsets[kSpanColumns / kGroupUnit][kTileRows];
};

/// Integers of low_bits + high_bits bits. take() gives the codes of quads 0, 1 ... 7 in turn.
template <int low_bits, int high_bits>
struct Planes {
    static constexpr int blocks = low_bits + high_bits, passes = 1, largest = (1 << blocks) - 1;

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
                              const uint8_t* const (&strips)[vectors], const int8_t* x, ptrdiff_t stride, int quad,
                              typename V::Bytes table) {
    constexpr bool narrow = V::template narrow<Codes::largest>();
#pragma GCC unroll 8
    for (int q = quad; q < quad + quads; ++q) {
        typename V::Bytes codes[vectors];
#pragma GCC unroll 8
        for (int i = 0; i < vectors; ++i) codes[i] = Codes::template take<V>(readers[i], strips[i], q, table);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; ++t) {
            const auto four = V::broadcast4(x + t * stride, q);
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
                             const uint8_t* const (&strips)[vectors], const int8_t* x, ptrdiff_t stride, int quad,
                             typename V::Bytes table) {
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

/// The sum of the activation codes of a unit, from the sums of 16 columns; and the same of the moments.
template <int unit, class T>
TRITKIT_INLINE T unit_sum(const T* sums) {
    return unit == kGroupUnit ? sums[0] : sums[0] + sums[1];
}

/// Products of `tokens` tokens, from `token` on, with `tiles` tiles: tile, tile + distance, ...
template <class V, class Codes, int unit, int tokens, int tiles>
void group_block(const GroupProduct& p, int tile, int distance, int token) {
    constexpr int parts = kParts<V>, vectors = tiles * parts, lanes = V::kBytes / 4;
    const GroupLayout& g = p.layout;
    const ptrdiff_t tile_bytes = g.tile_bytes(), stride = p.x.code_stride, strips = p.x.strips;
    const int8_t* x = p.x.codes + token * stride;
    const float *x_scales = p.x.scales + token * strips, *moments = p.x.moments + token * 2 * strips;
    const int32_t* x_sums = p.x.sums + token * 2 * strips;
    typename V::Bytes tables[Codes::passes];
    if constexpr (Codes::blocks == 4 && Codes::largest == 255)
        for (int pass = 0; pass < Codes::passes; ++pass) tables[pass] = V::load_table(p.table + 16 * pass);
    else
        tables[0] = V::splat(0);
    const uint8_t* w[tiles];
    SpanScales scales[tiles];
    for (int i = 0; i < tiles; ++i) w[i] = p.weights + static_cast<ptrdiff_t>(tile + i * distance) * tile_bytes;
    typename V::Floats sums[tokens][vectors];
    clear(sums, V::no_floats());

    for (int begin = 0; begin < g.columns; begin += kSpanColumns) {
        const int end = g.span_end(begin);
        for (int i = 0; i < tiles; ++i) w[i] = read_scales<V, unit>(g, w[i], begin, end, scales[i]);
        for (int k = begin; k < end; k += kStripColumns) {
            const uint8_t* at[vectors];
            typename Codes::template Reader<V> readers[vectors];
#pragma GCC unroll 8
            for (int i = 0; i < tiles; ++i) {
#pragma GCC unroll 8
                for (int b = 0; b < Codes::blocks; ++b) __builtin_prefetch(w[i] + b * kBlockBytes + kAhead);
#pragma GCC unroll 4
                for (int part = 0; part < parts; ++part) at[i * parts + part] = w[i] + part * V::kBytes;
                w[i] += Codes::blocks * kBlockBytes;
            }
#pragma GCC unroll 2
            for (int half = 0; half < kStripColumns / unit; ++half) {
                const int u = (k - begin) / unit + half, at16 = k / kGroupUnit + half;
                typename V::Ints products[tokens][vectors];
#pragma GCC unroll 8
                for (int t = 0; t < tokens; ++t) {
                    const int32_t sum = unit_sum<unit>(x_sums + t * 2 * strips + at16);
                    const auto start = V::plus(V::splat32(-p.bias * sum), V::template start<Codes::largest>(sum));
#pragma GCC unroll 8
                    for (int i = 0; i < vectors; ++i) products[t][i] = start;
                }
#pragma GCC unroll 2
                for (int pass = 0; pass < Codes::passes; ++pass) {
                    if (pass) {
#pragma GCC unroll 8
                        for (int t = 0; t < tokens; ++t) {
                            const auto start =
                                V::template start<Codes::largest>(unit_sum<unit>(x_sums + t * 2 * strips + at16));
#pragma GCC unroll 8
                            for (int i = 0; i < vectors; ++i)
                                products[t][i] = V::plus(V::shift_left(products[t][i], 8), start);
                        }
                    }
                    add_unit<V, Codes, unit>(products, readers, at, x + k, stride, half * unit / 4, tables[pass]);
                }
#pragma GCC unroll 8
                for (int i = 0; i < vectors; ++i) {
                    const auto scale = V::load_floats(scales[i / parts].scales[u] + i % parts * lanes);
#pragma GCC unroll 8
                    for (int t = 0; t < tokens; ++t)
                        sums[t][i] = V::fma(V::times(V::to_floats(products[t][i]), scale),
                                            V::splat_floats(x_scales[t * strips + k / kStripColumns]), sums[t][i]);
                }
                if (g.offsets != GroupOffsets::kNone) {
#pragma GCC unroll 8
                    for (int t = 0; t < tokens; ++t) {
                        const auto moment = V::splat_floats(unit_sum<unit>(moments + t * 2 * strips + at16));
#pragma GCC unroll 8
                        for (int i = 0; i < vectors; ++i)
                            sums[t][i] = V::fma(V::load_floats(scales[i / parts].offsets[u] + i % parts * lanes),
                                                moment, sums[t][i]);
                    }
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 8
        for (int i = 0; i < vectors; ++i)
            V::store_floats(p.out + (token + t) * p.out_stride +
                                (tile + i / parts * distance - p.tile_begin) * kTileRows + i % parts * lanes,
                            sums[t][i]);
}

/// group_block with a number of tokens that is known only now, at most `most`.
template <class V, class Codes, int unit, int most, int tiles>
void group_tokens(const GroupProduct& p, int tile, int distance, int token, int tokens) {
    if constexpr (most > 1) {
        if (tokens < most) {
            group_tokens<V, Codes, unit, most - 1, tiles>(p, tile, distance, token, tokens);
            return;
        }
    }
    group_block<V, Codes, unit, most, tiles>(p, tile, distance, token);
}

/// All tiles from `tile` to `end`, `streams` of them at the same time and far apart; with each of them all tokens, in
/// groups of about the same size.
template <class V, class Codes, int unit, int most, int streams>
void group_streams(const GroupProduct& p, int tile, int end) {
    const int distance = (end - tile) / streams, groups = (p.tokens + most - 1) / most;
    for (int i = 0; i < distance; ++i) {
        for (int g = 0; g < groups; ++g) {
            const int token = p.tokens * g / groups, tokens = p.tokens * (g + 1) / groups - token;
            group_tokens<V, Codes, unit, most, streams>(p, tile + i, distance, token, tokens);
        }
    }
    if constexpr (streams > 1) group_streams<V, Codes, unit, most, streams / 2>(p, tile + streams * distance, end);
}

template <class V, class Codes, int unit>
void group_product(const GroupProduct& p) {
    if (p.tokens == 1)
        group_streams<V, Codes, unit, 1, V::kStreams>(p, p.tile_begin, p.tile_end);
    else
        group_streams<V, Codes, unit, V::kGroupTokens, V::kGroupTiles>(p, p.tile_begin, p.tile_end);
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

// Attention over the pages, over `V` as in vector_kernels.h. Queries of the same kv head share every read of K and V.
//
// 32 and 16 bits: float products. 8, 4 and 3 bits: integer products, K with int8 queries, V with the softmax weights
// (times the scale of their value) as integers of 14 bits in two planes, so that only the cache's own rounding counts.
#pragma once

#include "vector_kernels.h"

// --- The formats: `vectors` vectors a step, each of 16 rows and as many columns as one broadcast of x has.

template <class V>
struct Float32Cache {
    using X = float;
    using Out = float;
    using Sum = typename V::F;
    using Weights = typename V::F;
    static constexpr int vectors = 1, columns = 1, step_bytes = 64;
    template <int f>
    TRITKIT_INLINE Weights unpack(const uint8_t* step) {
        return V::load(reinterpret_cast<const float*>(step));
    }
    TRITKIT_INLINE Sum multiply(Sum sum, Weights w, const float* x) { return V::fma(w, V::set1(*x), sum); }
    TRITKIT_INLINE Sum zero() { return V::set1(0.0f); }
    TRITKIT_INLINE Sum load(const float* out) { return V::load(out); }
    TRITKIT_INLINE void store(float* out, Sum sum) { V::store(out, sum); }
};

template <class V>
struct Float16Cache : Float32Cache<V> {
    static constexpr int step_bytes = 32;
    template <int f>
    TRITKIT_INLINE typename V::F unpack(const uint8_t* step) {
        return V::load_f16(reinterpret_cast<const uint16_t*>(step));
    }
};

/// What the three kinds of codes share. kMost: the largest code, also twice the zero point.
template <class V, int bits>
struct CodeCache {
    using X = int8_t;
    using Out = int32_t;
    using Sum = typename V::I;
    using Weights = typename V::Bytes;
    static constexpr int kMost = (1 << bits) - 1;
    static constexpr int columns = 4;
    TRITKIT_INLINE Sum multiply(Sum sum, Weights w, const int8_t* x) {
        return bits == 8 ? V::dot(sum, w, V::broadcast4(x)) : V::dot_small(sum, w, V::broadcast4(x));
    }
    TRITKIT_INLINE Sum zero() { return V::iset1(0); }
    TRITKIT_INLINE Sum load(const int32_t* out) { return V::iload(out); }
    TRITKIT_INLINE void store(int32_t* out, Sum sum) { V::istore(out, sum); }
};

template <class V>
struct Code8Cache : CodeCache<V, 8> {
    static constexpr int vectors = 1, step_bytes = 64;
    template <int f>
    TRITKIT_INLINE typename V::Bytes unpack(const uint8_t* step) {
        return V::load_bytes(step);
    }
};

template <class V>
struct Code4Cache : CodeCache<V, 4> {
    static constexpr int vectors = 2, step_bytes = 64;
    template <int f>
    TRITKIT_INLINE typename V::Bytes unpack(const uint8_t* step) {
        return V::template field<4 * f, 15>(V::load_bytes(step));
    }
};

template <class V>
struct Code3Cache : CodeCache<V, 3> {
    static constexpr int vectors = 8, step_bytes = 192;
    template <int f>
    TRITKIT_INLINE typename V::Bytes unpack(const uint8_t* step) {
        const typename V::Bytes low = V::load_bytes(step + f / 4 * 64), high = V::load_bytes(step + 128);
        return V::either(V::template field<2 * (f % 4), 3>(low), V::template field<f - 2, 4>(high));
    }
};

// --- out[r][16 * tile ...] = (or +=) the tiles times row r of x.

struct Tiles {
    const uint8_t* data;
    ptrdiff_t tile_bytes;
    int tiles, steps;
    const uint8_t* ahead;  // prefetched meanwhile, byte for byte; may be null
};

template <class V, class Kind, int f, int tiles, int rows>
TRITKIT_INLINE void one_step(typename Kind::Sum (&sums)[rows][tiles], const uint8_t* step, ptrdiff_t tile_bytes,
                             const typename Kind::X* x, ptrdiff_t x_stride) {
    typename Kind::Weights w[tiles];
#pragma GCC unroll 4
    for (int t = 0; t < tiles; ++t) w[t] = Kind::template unpack<f>(step + t * tile_bytes);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < tiles; ++t)
            sums[r][t] = Kind::multiply(sums[r][t], w[t], x + r * x_stride + f * Kind::columns);
    if constexpr (f + 1 < Kind::vectors) one_step<V, Kind, f + 1, tiles, rows>(sums, step, tile_bytes, x, x_stride);
}

template <class V, class Kind, int tiles, int rows>
void product_block(const Tiles& m, int tile, const typename Kind::X* x, ptrdiff_t x_stride, bool add,
                   const uint8_t* ahead, typename Kind::Out* out, ptrdiff_t out_stride) {
    typename Kind::Sum sums[rows][tiles];
    out += tile * kLanes;
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < tiles; ++t) sums[r][t] = add ? Kind::load(out + r * out_stride + t * kLanes) : Kind::zero();
    const uint8_t* step = m.data + tile * m.tile_bytes;
    const ptrdiff_t distance = ahead ? ahead - m.data : 0;
    for (int s = 0; s < m.steps; ++s, step += Kind::step_bytes, x += Kind::vectors * Kind::columns) {
        if (ahead) {
#pragma GCC unroll 4
            for (int t = 0; t < tiles; ++t)
#pragma GCC unroll 4
                for (int line = 0; line < Kind::step_bytes; line += 64)
                    __builtin_prefetch(step + distance + t * m.tile_bytes + line);
        }
        one_step<V, Kind, 0, tiles, rows>(sums, step, m.tile_bytes, x, x_stride);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < tiles; ++t) Kind::store(out + r * out_stride + t * kLanes, sums[r][t]);
}

template <class V, class Kind, int tiles>
void product_rows(const Tiles& m, int tile, const typename Kind::X* x, ptrdiff_t x_stride, int rows, bool add,
                  typename Kind::Out* out, ptrdiff_t out_stride) {
    const uint8_t* ahead = m.ahead;
    for (; rows >= 4; rows -= 4, x += 4 * x_stride, out += 4 * out_stride, ahead = nullptr)
        product_block<V, Kind, tiles, 4>(m, tile, x, x_stride, add, ahead, out, out_stride);
    if (rows == 3) product_block<V, Kind, tiles, 3>(m, tile, x, x_stride, add, ahead, out, out_stride);
    if (rows == 2) product_block<V, Kind, tiles, 2>(m, tile, x, x_stride, add, ahead, out, out_stride);
    if (rows == 1) product_block<V, Kind, tiles, 1>(m, tile, x, x_stride, add, ahead, out, out_stride);
}

template <class V, class Kind>
void product(Tiles m, const typename Kind::X* x, ptrdiff_t x_stride, int rows, bool add, typename Kind::Out* out,
             ptrdiff_t out_stride) {
    int tile = 0;
    // Codes that share bytes: unpacked once for eight rows of x.
    if constexpr (V::kTiles == 4 && Kind::columns > 1) {
        for (; rows >= 8; rows -= 8, x += 8 * x_stride, out += 8 * out_stride, m.ahead = nullptr) {
            for (tile = 0; tile + 2 <= m.tiles; tile += 2)
                product_block<V, Kind, 2, 8>(m, tile, x, x_stride, add, m.ahead, out, out_stride);
            if (tile < m.tiles) product_block<V, Kind, 1, 8>(m, tile, x, x_stride, add, m.ahead, out, out_stride);
        }
        tile = 0;
    }
    for (; tile + V::kTiles <= m.tiles; tile += V::kTiles)
        product_rows<V, Kind, V::kTiles>(m, tile, x, x_stride, rows, add, out, out_stride);
    for (; tile < m.tiles; ++tile) product_rows<V, Kind, 1>(m, tile, x, x_stride, rows, add, out, out_stride);
}

// --- One range: scores, softmax, sums of the values.

TRITKIT_INLINE int seen_by(const RangeWork& w, int row) {
    const int seen = w.visible + row / w.group;
    return seen < kRangePositions ? seen : kRangePositions;
}

TRITKIT_INLINE int pages_seen(const RangeWork& w) {
    return (seen_by(w, w.rows - 1) + kPagePositions - 1) / kPagePositions;
}

constexpr ptrdiff_t kAhead = 12288;

/// The matrices are read in this order: the keys of all pages, their values, the keys that follow. The one to prefetch
/// during number i lies kAhead behind: much farther and it is thrown out again, much nearer and it comes late.
TRITKIT_INLINE const uint8_t* read_later(const RangeWork& w, int i) {
    const int pages = pages_seen(w), distance = static_cast<int>(kAhead / w.layout->values);
    i += distance < 1 ? 1 : distance < kRangePages ? distance : kRangePages;
    if (i < pages) return w.pages[i];
    if (i < 2 * pages) return w.pages[i - pages] + w.layout->values;
    return i - 2 * pages < kRangePages ? w.next[i - 2 * pages] : nullptr;
}

template <class V, class Kind, class X, class Out>
void multiply_keys(const RangeWork& w, const X* queries, Out* scores) {
    const KvLayout& l = *w.layout;
    const int seen = seen_by(w, w.rows - 1);
    for (int at = 0; at < seen; at += kPagePositions) {
        const int left = seen - at, tiles = left < kPagePositions ? (left + kLanes - 1) / kLanes : 4;
        const uint8_t* page = w.pages[at / kPagePositions];
        const uint8_t* ahead = read_later(w, at / kPagePositions);
        product<V, Kind>({page, l.key_tile, tiles, l.key_steps, ahead}, queries, w.query_stride, w.rows, false,
                         scores + at, kRangePositions);
    }
}

/// x: [rows, kRangePositions].
template <class V, class Kind, class X, class Out>
void multiply_values(const RangeWork& w, const X* x, int rows, Out* out, ptrdiff_t out_stride) {
    const KvLayout& l = *w.layout;
    const int seen = seen_by(w, w.rows - 1), step = kPagePositions / l.value_steps, pages = pages_seen(w);
    for (int at = 0; at < seen; at += kPagePositions) {
        const int left = seen - at;
        // What is beyond the last position was never written, or is of a sequence that is gone.
        const int steps = left < kPagePositions ? (left + step - 1) / step : l.value_steps;
        const uint8_t* page = w.pages[at / kPagePositions];
        const uint8_t* ahead = read_later(w, pages + at / kPagePositions);
        product<V, Kind>({page + l.values, l.value_tile, l.value_tiles, steps, ahead}, x + at, kRangePositions, rows,
                         at > 0, out, out_stride);
    }
}

/// scores[0..seen) to exp((score - highest) * factor), zeros behind them; stores highest * factor and the sum.
template <class V>
void softmax(float* scores, int seen, float factor, float* highest, float* total) {
    typename V::F top = V::set1(scores[0]);
    for (int i = 0; i < seen; i += kLanes) top = V::max(V::select_first(V::load(scores + i), seen - i, scores[0]), top);
    const float most = V::highest(top);
    typename V::F sum = V::set1(0.0f);
    for (int i = 0; i < seen; i += kLanes) {
        const typename V::F e = exp_of<V>(V::mul(V::sub(V::load(scores + i), V::set1(most)), V::set1(factor)));
        const typename V::F weight = V::select_first(e, seen - i, 0.0f);
        V::store(scores + i, weight);
        sum = V::add(sum, weight);
    }
    for (int i = (seen + kLanes - 1) / kLanes * kLanes; i < kRangePositions; i += kLanes)
        V::store(scores + i, V::set1(0.0f));
    *highest = most * factor;
    *total = V::sum(sum);
}

template <class V, class Kind>
void attend_floats(const RangeWork& w) {
    const int size = w.layout->value_tiles * kLanes;
    const ptrdiff_t stride = size + kPartialExtra;
    multiply_keys<V, Kind>(w, w.queries, w.scores);
    for (int r = 0; r < w.rows; ++r) {
        float* partial = w.partial + r * stride;
        softmax<V>(w.scores + r * kRangePositions, seen_by(w, r), w.scaling, partial + size, partial + size + 1);
    }
    multiply_values<V, Kind>(w, w.scores, w.rows, w.partial, stride);
}

/// Twice the score of the first position in units of query scale, from its 8-bit key.
TRITKIT_INLINE float first_score(const RangeWork& w, int row, float scale) {
    const int8_t* q = w.codes + row * w.query_stride;
    int32_t sum = 0;
    for (int i = 0; i < w.layout->head_dim; ++i) sum += (2 * w.first[i] - 255) * q[i];
    return static_cast<float>(sum) * scale;
}

constexpr int kWeightLevels = 16383;  // 14 bits: 128 * high + low

/// Softmax weights times the scales of the values, as integers in two planes; returns their scale, stores their sum.
template <class V>
TRITKIT_INLINE float quantize_weights(const float* weights, const RangeWork& w, int seen, int8_t* high, int8_t* low,
                                      int32_t* sum) {
    typename V::F scaled[kRangePositions / kLanes], top = V::set1(0.0f);
    const int vectors = (seen + kLanes - 1) / kLanes;
    for (int i = 0; i < vectors; ++i) {
        const uint8_t* page = w.pages[i / 4] + w.layout->value_scales;
        const typename V::F scales = V::load_f16(reinterpret_cast<const uint16_t*>(page) + i % 4 * kLanes);
        scaled[i] = V::select_first(V::mul(V::load(weights + i * kLanes), scales), seen - i * kLanes, 0.0f);
        top = V::max(scaled[i], top);
    }
    const float most = V::highest(top), factor = most > 1e-30f ? kWeightLevels / most : 0.0f;
    typename V::I total = V::iset1(0);
    for (int i = 0; i < kRangePositions / kLanes; ++i) {
        const typename V::I code = i < vectors ? V::round(V::mul(scaled[i], V::set1(factor))) : V::iset1(0);
        total = V::iadd(total, code);
        V::store_bytes(high + i * kLanes, V::template shift_right<7>(code));
        V::store_bytes(low + i * kLanes, V::iand(code, V::iset1(127)));
    }
    *sum = V::isum(total);
    return most / kWeightLevels;
}

template <class V, class Kind>
void attend_codes(const RangeWork& w) {
    const KvLayout& l = *w.layout;
    const int size = l.value_tiles * kLanes;
    const ptrdiff_t stride = size + kPartialExtra;
    const uint16_t* scales_of_first = reinterpret_cast<const uint16_t*>(w.first + l.first_scales);
    const float first_key_scale = w.first ? float_from_f16(scales_of_first[0]) : 0.0f;
    const float first_scale = w.first ? float_from_f16(scales_of_first[1]) : 0.0f;
    int32_t* integers = reinterpret_cast<int32_t*>(w.scores);
    for (int page = 0; page < pages_seen(w); ++page)
        for (ptrdiff_t line = l.key_scales; line < l.bytes; line += 64) __builtin_prefetch(w.pages[page] + line);
    multiply_keys<V, Kind>(w, w.codes, integers);
    for (int r = 0; r < w.rows; ++r) {
        const int seen = seen_by(w, r);
        float* scores = w.scores + r * kRangePositions;
        const typename V::I zero = V::iset1(Kind::kMost * w.sums[r]);
        for (int i = 0; i < seen; i += kLanes) {
            const uint8_t* page = w.pages[i / kPagePositions] + l.key_scales;
            const typename V::F scales = V::load_f16(reinterpret_cast<const uint16_t*>(page) + i % kPagePositions);
            const typename V::I sum = V::iload(integers + r * kRangePositions + i);
            V::store(scores + i, V::mul(V::to_float(V::isub(V::iadd(sum, sum), zero)), scales));
        }
        if (w.first) scores[0] = first_score(w, r, first_key_scale);
        float* partial = w.partial + r * stride;
        softmax<V>(scores, seen, 0.5f * w.scaling * w.scales[r], partial + size, partial + size + 1);
        // Until the last loop: the weight of the first position, and what the integers mean.
        partial[size + 2] = w.first ? scores[0] : 0.0f;
        if (w.first) scores[0] = 0.0f;
        int8_t* weights = w.weights + 2 * r * kRangePositions;
        partial[size + 3] = quantize_weights<V>(scores, w, seen, weights, weights + kRangePositions, w.weight_sums + r);
    }
    multiply_values<V, Kind>(w, w.weights, 2 * w.rows, w.products, size);
    for (int r = 0; r < w.rows; ++r) {
        float* partial = w.partial + r * stride;
        const typename V::I zero = V::iset1(Kind::kMost * w.weight_sums[r]);
        const typename V::F first_weight = V::set1(0.5f * first_scale * partial[size + 2]);
        const typename V::F scale = V::set1(0.5f * partial[size + 3]);
        for (int i = 0; i < size; i += kLanes) {
            const typename V::I high = V::iload(w.products + 2 * r * size + i);
            const typename V::I low = V::iload(w.products + (2 * r + 1) * size + i);
            // 2 * (128 * high + low) - zero; at most 255 * 16383 * 256 < 2^31, steps on the way may wrap.
            const typename V::I twice = V::iadd(V::template shift_left<8>(high), V::iadd(low, low));
            typename V::F value = V::mul(V::to_float(V::isub(twice, zero)), scale);
            if (w.first) {
                const typename V::I code = V::load_codes(w.first + l.first_values + i);
                const typename V::F doubled = V::to_float(V::isub(V::iadd(code, code), V::iset1(255)));
                value = V::fma(doubled, first_weight, value);
            }
            V::store(partial + i, value);
        }
    }
}

template <class V>
void attend_range(const RangeWork& w) {
    switch (w.layout->bits) {
        case 32:
            return attend_floats<V, Float32Cache<V>>(w);
        case 16:
            return attend_floats<V, Float16Cache<V>>(w);
        case 8:
            return attend_codes<V, Code8Cache<V>>(w);
        case 4:
            return attend_codes<V, Code4Cache<V>>(w);
        default:
            return attend_codes<V, Code3Cache<V>>(w);
    }
}

template <class V>
void merge_partials(float* into, const float* part, int rows, int size) {
    for (int r = 0; r < rows; ++r, into += size + kPartialExtra, part += size + kPartialExtra) {
        const float a = into[size], b = part[size], most = a > b ? a : b;
        const typename V::F old = exp_of<V>(V::set1(a - most)), now = exp_of<V>(V::set1(b - most));
        for (int i = 0; i < size; i += kLanes)
            V::store(into + i, V::fma(V::load(part + i), now, V::mul(V::load(into + i), old)));
        into[size] = most;
        into[size + 1] = V::highest(V::fma(V::set1(part[size + 1]), now, V::mul(V::set1(into[size + 1]), old)));
    }
}

// --- What is stored.

template <class V>
uint16_t encode(const float* x, int n, int bits, void* out) {
    if (bits == 16) {
        for (int i = 0; i < n; i += kLanes) V::store_f16(static_cast<uint16_t*>(out) + i, V::load_first(x + i, n - i));
        return 0;
    }
    typename V::F top = V::set1(0.0f);
    for (int i = 0; i < n; i += kLanes) top = V::max(V::abs(V::load_first(x + i, n - i)), top);
    const float most = static_cast<float>((1 << bits) - 1);
    const uint16_t scale = f16_from_float(V::highest(top) * (2.0f / most));
    const float rounded = float_from_f16(scale);
    const typename V::F inverse = V::set1(rounded > 0.0f ? 1.0f / rounded : 0.0f), middle = V::set1(0.5f * most);
    for (int i = 0; i < n; i += kLanes) {
        const typename V::F code = V::fma(V::load_first(x + i, n - i), inverse, middle);
        V::store_bytes(static_cast<int8_t*>(out) + i, V::round(V::min(V::max(code, V::set1(0.0f)), V::set1(most))));
    }
    return scale;
}

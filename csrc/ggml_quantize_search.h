// The searches behind ggml's quantisers: which scale, or scale and minimum, lets integer codes say a group best.
//
// ggml walks through one group after the other. Here several of them lie side by side in a vector V, x[i] holding the
// i-th value of each; within a group every float operation is ggml's, in its order, and so is every bit of the result.
// V may be a float as well: one group. Values and weights may be any finite numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace tritkit::ggml {

constexpr int kLanes = 4;
// Vectors as gcc and clang know them on every CPU; they take the usual operators.
using Floats = float __attribute__((vector_size(4 * kLanes)));
using Integers = int32_t __attribute__((vector_size(4 * kLanes)));

constexpr float kNothing = 1e-15f;  // a group without a larger value is zeros

inline float broadcast(float x, float) { return x; }
inline Floats broadcast(float x, Floats) { return Floats{} + x; }

inline float select(bool which, float a, float b) { return which ? a : b; }
inline Floats select(Integers which, Floats a, Floats b) { return which ? a : b; }

inline float size_of(float x) { return std::fabs(x); }
inline Floats size_of(Floats x) { return (Floats)((Integers)x & 0x7fffffff); }

inline bool any(float x) { return x != 0; }
inline bool any(Floats x) {
    for (int k = 0; k < kLanes; ++k)
        if (x[k] != 0) return true;
    return false;
}

/// The nearest integer, halves to even; from 2^22 on, what is left of it in the low bits of a float.
inline float nearest(float x) {
    const float shifted = x + 12582912.0f;  // 1.5 * 2^23
    uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    return static_cast<float>(static_cast<int32_t>(bits & 0x7fffff) - 0x400000);
}
inline Floats nearest(Floats x) {
    return __builtin_convertvector(((Integers)(x + 12582912.0f) & 0x7fffff) - 0x400000, Floats);
}

template <class V>
inline V nearest(V x, float lo, float hi) {
    const V low = broadcast(lo, V{}), high = broadcast(hi, V{}), n = nearest(x), above = select(n > low, n, low);
    return select(above < high, above, high);
}

/// The value of largest size of each group, the first of them, and its size.
template <class V, int N>
V largest_of(const V (&x)[N], V& widest) {
    V largest = widest = V{};
    for (int i = 0; i < N; ++i) {
        const V size = size_of(x[i]);
        largest = select(size > widest, x[i], largest);
        widest = select(size > widest, size, widest);
    }
    return largest;
}

/// sum w x c and sum w c^2, of which the best scale for the codes c is the quotient.
template <class V>
struct Fit {
    V xc, cc;
};

template <class V, int N>
Fit<V> fit_at(V inverse, const V (&x)[N], const V (&w)[N], float top) {
    V xc = {}, cc = {};
    for (int i = 0; i < N; ++i) {
        const V c = nearest(inverse * x[i], -top, top - 1);
        xc += w[i] * x[i] * c;
        cc += w[i] * c * c;
    }
    return {xc, cc};
}

/// Codes in [-top, top - 1] and a scale: the largest value becomes the lowest code, or nearly, in steps of a tenth of a
/// code. codes: plus top, and 0 in a group of zeros.
template <class V, int N>
V search_scale(const V (&x)[N], const V (&w)[N], float top, V (&codes)[N]) {
    const V zero = {};
    V widest;
    const V largest = largest_of(x, widest);
    V inverse = broadcast(-top, zero) / largest;
    const Fit<V> first = fit_at(inverse, x, w, top);
    V scale = select(first.cc != zero, first.xc / first.cc, zero), best = scale * first.xc;
    for (int step = -9; step <= 9; ++step) {
        if (step == 0) continue;
        const V other = broadcast(-(top + 0.1f * static_cast<float>(step)), zero) / largest;
        const Fit<V> fit = fit_at(other, x, w, top);
        const auto better = (fit.cc > zero) & (fit.xc * fit.xc > best * fit.cc);
        scale = select(better, fit.xc / fit.cc, scale);
        best = select(better, scale * fit.xc, best);
        inverse = select(better, other, inverse);
    }
    const auto empty = widest < broadcast(kNothing, zero);
    for (int i = 0; i < N; ++i) codes[i] = select(empty, zero, nearest(inverse * x[i], -top, top - 1) + top);
    return select(empty, zero, scale);
}

struct MinSearch {
    float top;           // codes run from 0 to top
    float first, delta;  // the range is stretched to top + first, top + first + delta, ... codes
    int steps;           // one less than there are
};

/// Codes in [0, top], a scale and a minimum that is not positive: weighted least squares for each of the stretched
/// ranges. The minimum that was found moves the ranges of the steps after it.
template <bool kAbsolute, class V, int N>
V search_scale_and_min(const V (&x)[N], const V (&w)[N], const MinSearch& s, V& min, V (&codes)[N]) {
    const V zero = {};
    V low = x[0], high = x[0], sum_w = w[0], sum_x = w[0] * x[0];
    for (int i = 1; i < N; ++i) {
        low = select(x[i] < low, x[i], low);
        high = select(x[i] > high, x[i], high);
        sum_w += w[i];
        sum_x += w[i] * x[i];
    }
    low = select(low > zero, zero, low);
    const auto flat = high == low;
    V start = low, inverse = broadcast(s.top, zero) / (high - low);  // of the best codes so far
    V scale = broadcast(1, zero) / inverse, error = {};
    const auto weighted = [](V weight, V difference) {
        return weight * (kAbsolute ? size_of(difference) : difference * difference);
    };
    for (int i = 0; i < N; ++i) {
        const V c = nearest(inverse * (x[i] - low), 0, s.top);
        error += weighted(w[i], scale * c + low - x[i]);
    }
    for (int step = 0; step <= s.steps; ++step) {
        const V other = broadcast(s.first + s.delta * static_cast<float>(step) + s.top, zero) / (high - low);
        V sum_c = {}, sum_cc = {}, sum_xc = {};
        for (int i = 0; i < N; ++i) {
            const V c = nearest(other * (x[i] - low), 0, s.top), wc = w[i] * c;
            codes[i] = c;
            sum_c += wc;
            sum_cc += wc * c;
            sum_xc += wc * x[i];
        }
        const V determinant = sum_w * sum_cc - sum_c * sum_c;
        const V b = (sum_cc * sum_x - sum_c * sum_xc) / determinant;
        const V its_min = select(b > zero, zero, b);
        const V its_scale = select(b > zero, sum_xc / sum_cc, (sum_w * sum_xc - sum_x * sum_c) / determinant);
        V its_error = {};
        for (int i = 0; i < N; ++i) its_error += weighted(w[i], its_scale * codes[i] + its_min - x[i]);
        const auto better = (determinant > zero) & (its_error < error);
        inverse = select(better, other, inverse);
        start = select(better, low, start);
        error = select(better, its_error, error);
        scale = select(better, its_scale, scale);
        low = select(better, its_min, low);
    }
    for (int i = 0; i < N; ++i) codes[i] = select(flat, zero, nearest(inverse * (x[i] - start), 0, s.top));
    min = -low;
    return select(flat, zero, scale);
}

/// What a code is where ggml keeps it in a byte.
inline float as_byte(float code) { return static_cast<float>(static_cast<uint8_t>(static_cast<int32_t>(code))); }

/// Five times at most, each code in its turn becomes what is best beside all others, if that raises xc^2 / cc.
/// positive: codes are bytes without a lower bound.
template <bool kPositive, class V, int N>
void improve(const V (&x)[N], const V (&w)[N], int count, float lo, float hi, V (&codes)[N], Fit<V>& fit) {
    const V zero = {};
    for (int pass = 0; pass < 5; ++pass) {
        V changed = {};
        for (int i = 0; i < count; ++i) {
            const V wx = w[i] * x[i], c = codes[i];
            const Fit<V> rest = {fit.xc - wx * c, fit.cc - w[i] * c * c};
            const V n = nearest(x[i] * rest.cc / rest.xc, lo, hi);
            const Fit<V> with = {rest.xc + wx * n, rest.cc + w[i] * n * n};
            auto better = (rest.xc > zero) & (n != c) & ((kPositive ? rest.cc : with.cc) > zero);
            better = better & (with.xc * with.xc * fit.cc > fit.xc * fit.xc * with.cc);
            if constexpr (kPositive)
                codes[i] = select(better, as_byte(n), c);
            else
                codes[i] = select(better, n, c);
            fit.xc = select(better, with.xc, fit.xc);
            fit.cc = select(better, with.cc, fit.cc);
            changed = select(better, broadcast(1, zero), changed);
        }
        if (!any(changed)) break;
    }
}

/// Codes in [-top, top - 1] and a scale for weights that are the squares of the values, improved one by one.
/// codes: plus top, and 0 in a group of zeros.
template <class V, int N>
V search_scale_by_codes(const V (&x)[N], float top, V (&codes)[N]) {
    const V zero = {};
    V widest, w[N];
    const V largest = largest_of(x, widest), inverse = broadcast(-top, zero) / largest;
    for (int i = 0; i < N; ++i) {
        w[i] = x[i] * x[i];
        codes[i] = nearest(inverse * x[i], -top, top - 1);
    }
    Fit<V> fit = fit_at(inverse, x, w, top);
    improve<false>(x, w, N, -top, top - 1, codes, fit);
    const auto empty = widest < broadcast(kNothing, zero);
    for (int i = 0; i < N; ++i) codes[i] = select(empty, zero, codes[i] + top);
    return select(fit.cc > zero, select(empty, zero, fit.xc / fit.cc), zero);
}

/// Codes from 0 to top and a scale for `count` values that are not negative: scales or minima of the groups of a block.
float search_positive(const float* values, const float* weights, int count, float top, uint8_t* codes);

}  // namespace tritkit::ggml

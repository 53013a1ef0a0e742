// The element-wise work between the linears, over `V`: vectors of 16 floats with the operations that each
// isa_*_vectors.cpp defines. Included inside its ISA region and its anonymous namespace, so that every file has its
// own copy. No standard library in here.
#pragma once

/// e^x, within 2 units in the last place; x is clamped to [-87, 88]. n = round(x / ln 2), r = x - n ln 2, then a
/// polynomial for e^r on [-ln2 / 2, ln2 / 2] (Cephes' coefficients).
template <class V>
TRITKIT_INLINE typename V::F exp_of(typename V::F x) {
    x = V::min(V::max(x, V::set1(-87.0f)), V::set1(88.0f));
    const typename V::I n = V::round(V::mul(x, V::set1(1.44269504f)));
    const typename V::F whole = V::to_float(n);
    typename V::F r = V::fma(whole, V::set1(-0.693359375f), x);
    r = V::fma(whole, V::set1(2.12194440e-4f), r);
    typename V::F p = V::set1(1.9875691500e-4f);
    p = V::fma(p, r, V::set1(1.3981999507e-3f));
    p = V::fma(p, r, V::set1(8.3334519073e-3f));
    p = V::fma(p, r, V::set1(4.1665795894e-2f));
    p = V::fma(p, r, V::set1(1.6666665459e-1f));
    p = V::fma(p, r, V::set1(5.0000001201e-1f));
    p = V::fma(p, V::mul(r, r), V::add(r, V::set1(1.0f)));
    return V::mul(p, V::power_of_two(n));
}

/// Four chains of 16 sums, so that the additions need not wait for each other.
template <class V>
void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
    typename V::F sums[4] = {V::set1(0.0f), V::set1(0.0f), V::set1(0.0f), V::set1(0.0f)};
    int i = 0;
    for (; i + 64 <= n; i += 64) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const typename V::F v = V::load(x + i + 16 * j);
            sums[j] = V::fma(v, v, sums[j]);
        }
    }
    for (; i < n; i += 16) {
        const typename V::F v = V::load_first(x + i, n - i);
        sums[0] = V::fma(v, v, sums[0]);
    }
    const float squares = V::sum(V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3])));
    const typename V::F inverse = V::set1(1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + eps));
    for (i = 0; i < n; i += 16) {
        const typename V::F v = V::mul(V::load_first(x + i, n - i), inverse);
        V::store_first(out + i, n - i, V::mul(V::load_first(weight + i, n - i), v));
    }
}

template <class V>
void silu_gate(float* gate, const float* up, int n) {
    const typename V::F one = V::set1(1.0f), zero = V::set1(0.0f);
    for (int i = 0; i < n; i += 16) {
        const typename V::F x = V::load_first(gate + i, n - i);
        const typename V::F silu = V::div(x, V::add(one, exp_of<V>(V::sub(zero, x))));
        V::store_first(gate + i, n - i, V::mul(silu, V::load_first(up + i, n - i)));
    }
}

template <class V>
void relu2_gate(float* gate, const float* up, int n) {
    for (int i = 0; i < n; i += 16) {
        const typename V::F x = V::max(V::load_first(gate + i, n - i), V::set1(0.0f));
        V::store_first(gate + i, n - i, V::mul(V::mul(x, x), V::load_first(up + i, n - i)));
    }
}

/// float32 sums of 1024 terms, float64 beyond.
template <class V>
double log_sum_exp(const float* x, int n) {
    typename V::F highest = V::set1(x[0]);
    for (int i = 0; i < n; i += 16)
        highest = V::max(V::select_first(V::load_first(x + i, n - i), n - i, x[0]), highest);
    const float top = V::highest(highest);
    double total = 0.0;
    for (int begin = 0; begin < n; begin += 1024) {
        const int end = begin + 1024 < n ? begin + 1024 : n;
        typename V::F sum = V::set1(0.0f);
        for (int i = begin; i < end; i += 16) {
            const typename V::F e = exp_of<V>(V::sub(V::load_first(x + i, end - i), V::set1(top)));
            sum = V::add(sum, V::select_first(e, end - i, 0.0f));
        }
        total += static_cast<double>(V::sum(sum));
    }
    return __builtin_log(total) + static_cast<double>(top);
}

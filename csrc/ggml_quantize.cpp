#include "ggml_quantize.h"

#include <algorithm>

#include "ggml_quantize_search.h"

namespace tritkit::ggml {

const std::vector<Quantizer>& quantizers() {
    static const std::vector<Quantizer> all = {
        {"q4_0", quantize_q4_0}, {"q4_1", quantize_q4_1}, {"q5_0", quantize_q5_0},   {"q5_1", quantize_q5_1},
        {"q8_0", quantize_q8_0}, {"q2_k", quantize_q2_k}, {"q3_k", quantize_q3_k},   {"q4_k", quantize_q4_k},
        {"q5_k", quantize_q5_k}, {"q6_k", quantize_q6_k}, {"tq1_0", quantize_tq1_0}, {"tq2_0", quantize_tq2_0},
    };
    return all;
}

const BlockType* find_block_type(const std::string& name) {
    for (const BlockType& type : block_types())
        if (type.name == name) return &type;
    return nullptr;
}

void quantize_rows(const Quantizer& quantizer, const float* x, const float* importance, int rows, int columns,
                   uint8_t* out, Pool& pool) {
    const BlockType& type = *find_block_type(quantizer.name);
    const size_t row_bytes = static_cast<size_t>(columns / type.columns) * type.bytes;
    pool.run([&](Team& team) {
        Chunks chunks(team, rows, 1);
        for (Range r = chunks.next(); !r.empty(); r = chunks.next())
            for (int row = r.begin; row < r.end; ++row)
                quantizer.row(x + static_cast<size_t>(row) * columns, importance, columns, out + row * row_bytes);
    });
}

float search_positive(const float* values, const float* weights, int count, float top, uint8_t* codes) {
    float x[16] = {}, w[16] = {}, c[16];
    std::copy(values, values + count, x);
    std::copy(weights, weights + count, w);
    std::fill(codes, codes + count, uint8_t{0});
    float largest = 0;
    for (int i = 0; i < count; ++i) largest = largest > x[i] ? largest : x[i];
    if (largest < kNothing) return 0;
    float inverse = top / largest, error = 0;
    for (int i = 0; i < count; ++i) {
        const float difference = x[i] - 1 / inverse * as_byte(nearest(inverse * x[i]));
        error += w[i] * difference * difference;
    }
    const auto code_at = [&](float at, int i) {
        const float n = nearest(at * x[i]);
        return n < top ? n : top;
    };
    for (int step = -4; step <= 4; ++step) {
        if (step == 0) continue;
        const float other = (0.1f * static_cast<float>(step) + top) / largest;
        float its_error = 0;
        for (int i = 0; i < count; ++i) {
            const float difference = x[i] - 1 / other * code_at(other, i);
            its_error += w[i] * difference * difference;
        }
        if (its_error < error) {
            error = its_error;
            inverse = other;
        }
    }
    Fit<float> fit = {};
    for (int i = 0; i < count; ++i) {
        const float n = code_at(inverse, i);
        c[i] = as_byte(n);
        fit.xc += w[i] * x[i] * n;
        fit.cc += w[i] * n * n;
    }
    improve<true>(x, w, count, -4194304.0f, top, c, fit);
    for (int i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(c[i]);
    return fit.cc > 0 ? fit.xc / fit.cc : 0;
}

}  // namespace tritkit::ggml

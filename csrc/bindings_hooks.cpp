// For the tests: the real path of one linear, of attention and of the quantizers, without a decoder.
#include <numeric>

#include "bindings.h"

namespace tritkit {
namespace {

nb::object integer_product(const std::string& layout, const Array& data, int rows, int columns, const Array& x,
                           const std::string& isa) {
    Runner runner(1, isa);
    const auto linear = new_linear(runner, layout, data, rows, columns, 1.0f, "a8", std::nullopt, false, "nothing");
    const int8_t* codes = checked<int8_t>(x, "x", 2);
    const int tokens = static_cast<int>(x.shape(0));
    checked<int8_t>(x, "x", {tokens, columns});
    const ptrdiff_t stride = code_stride(columns), out_stride = round_up(rows, kTileRows);
    AlignedArray<int8_t> padded(static_cast<size_t>(tokens * stride));
    std::vector<int32_t> sums, out(static_cast<size_t>(tokens * out_stride));
    for (int t = 0; t < tokens; ++t) {
        const int8_t* row = codes + static_cast<ptrdiff_t>(t) * columns;
        std::copy(row, row + columns, padded.data() + t * stride);
        sums.push_back(std::accumulate(row, row + columns, 0));
    }
    Linear::Scratch scratch;
    linear->reserve(tokens, 1, scratch);
    const auto& tiles = dynamic_cast<const TileLinear&>(*linear);
    tiles.integer_product({0, rows}, padded.data(), stride, sums.data(), tokens, out.data(), out_stride,
                          scratch.panel.data());
    int32_t* result = nullptr;
    nb::object array = new_array(result, {static_cast<size_t>(tokens), static_cast<size_t>(rows)});
    for (int t = 0; t < tokens; ++t)
        std::copy_n(out.data() + t * out_stride, rows, result + static_cast<ptrdiff_t>(t) * rows);
    return array;
}

/// y = linear(x), x float32 [tokens, columns], with its activation format.
nb::object apply(Runner& runner, const Linear& linear, const Array& x) {
    const int tokens = static_cast<int>(x.ndim() ? x.shape(0) : 0);
    const float* from = checked<float>(x, "x", {tokens, linear.columns()});
    Activations input(tokens, linear.columns());
    input.reserve(linear);
    for (int t = 0; t < tokens; ++t) {
        std::copy_n(from + static_cast<ptrdiff_t>(t) * linear.columns(), linear.columns(), input.row(t));
        input.quantize(t, runner.kernels, {&linear});
    }
    float* out = nullptr;
    nb::object array = new_array(out, {static_cast<size_t>(tokens), static_cast<size_t>(linear.rows())});
    {
        nb::gil_scoped_release release;
        std::vector<Linear::Scratch> scratch(static_cast<size_t>(runner.pool.size()));
        for (Linear::Scratch& s : scratch) linear.reserve(tokens, runner.pool.size(), s);
        runner.pool.run([&](Team& team) {
            linear.apply(linear.share(team), input, tokens, out, linear.rows(), Linear::Write::kStore,
                         scratch[static_cast<size_t>(team.rank)]);
        });
    }
    return array;
}

/// Attention of one layer over a new sequence; q, k, v: float32 [tokens, heads, head_dim].
nb::object attention(const Array& q, const Array& k, const Array& v, const Array& frequencies, int kv_bits, int threads,
                     const std::string& isa) {
    const float* queries = checked<float>(q, "q", 3);
    const int64_t tokens = static_cast<int64_t>(q.shape(0)), head_dim = static_cast<int64_t>(q.shape(2));
    const int64_t kv_heads = k.ndim() == 3 ? static_cast<int64_t>(k.shape(1)) : 0;
    const float* keys = checked<float>(k, "k", {tokens, kv_heads, head_dim});
    const float* values = checked<float>(v, "v", {tokens, kv_heads, head_dim});
    const HeadShape shape{static_cast<int>(q.shape(1)), static_cast<int>(kv_heads), static_cast<int>(head_dim)};
    Runner runner(threads, isa);
    KvPages pages(1, shape.kv_heads, shape.head_dim, kv_bits);
    Attention attention(shape, rotary_of(frequencies, shape.head_dim, 1.0f), pages, runner.kernels, runner.pool.size());
    const int sequence = pages.create();
    pages.reserve(sequence, static_cast<int>(tokens));
    std::vector<Token> step;
    for (int t = 0; t < tokens; ++t) step.push_back({0, &pages.at(sequence), t});
    attention.prepare(step, 1);
    float* out = nullptr;
    nb::object array = new_array(out, {q.shape(0), q.shape(1), q.shape(2)});
    runner.pool.run([&](Team& team) {
        attention.store(team, 0, queries, keys, values);
        team.barrier();
        attention.attend(team, 0, out, shape.heads * shape.head_dim);
    });
    return array;
}

/// Codes [tokens, columns] of float32 [tokens, columns], and their scales, [tokens] or [tokens, strips of 32].
std::pair<nb::object, nb::object> quantize(const Array& x, const std::string& format, const std::string& isa) {
    const float* from = checked<float>(x, "x", 2);
    const int tokens = static_cast<int>(x.shape(0)), columns = static_cast<int>(x.shape(1));
    const ActivationFormat activations = activation_format(format);
    const bool grouped = activations == ActivationFormat::kA8G32;
    Activations input(tokens, columns);
    input.reserve(activations);
    const size_t strips = static_cast<size_t>(input.strip_stride());
    int8_t* codes = nullptr;
    float* scales = nullptr;
    nb::object code_array = new_array(codes, {x.shape(0), x.shape(1)}),
               scale_array = grouped ? new_array(scales, {x.shape(0), strips}) : new_array(scales, {x.shape(0)});
    for (int t = 0; t < tokens && activations != ActivationFormat::kFloat; ++t) {
        std::copy_n(from + static_cast<ptrdiff_t>(t) * columns, columns, input.row(t));
        input.quantize(t, kernels_for(isa), {});
        int8_t* to = codes + static_cast<ptrdiff_t>(t) * columns;
        if (!grouped) {
            std::copy_n(input.codes(activations).codes.data() + t * input.code_stride(), columns, to);
            scales[t] = input.codes(activations).scales[t];
            continue;
        }
        const ActivationStrip* strip = input.strips() + t * input.strip_stride();
        for (int k = 0; k < columns; k += kStripColumns, ++strip) {
            std::copy_n(strip->codes, std::min(columns - k, kStripColumns), to + k);
            *scales++ = strip->scale;
        }
    }
    return {code_array, scale_array};
}

/// Codes [tokens, columns], with the centre taken away, scales [tokens, strips of 32] and shifts [tokens].
nb::object quantize_on_grid(const Array& x, const InputGrid& grid) {
    const float* from = checked<float>(x, "x", 2);
    const int tokens = static_cast<int>(x.shape(0)), columns = static_cast<int>(x.shape(1));
    const int strips = (columns + kStripColumns - 1) / kStripColumns;
    int8_t* codes = nullptr;
    float *scales = nullptr, *shifts = nullptr;
    const nb::object results[] = {new_array(codes, {x.shape(0), x.shape(1)}),
                                  new_array(scales, {x.shape(0), static_cast<size_t>(strips)}),
                                  new_array(shifts, {x.shape(0)})};
    AlignedArray<ActivationStrip> row(static_cast<size_t>(strips));
    for (int t = 0; t < tokens; ++t) {
        shifts[t] = quantize_inputs(grid, from + static_cast<ptrdiff_t>(t) * columns, columns, row.data());
        for (int i = 0; i < strips; ++i) {
            const int begin = i * kStripColumns;
            std::copy_n(row.data()[i].codes, std::min(columns - begin, kStripColumns),
                        codes + static_cast<ptrdiff_t>(t) * columns + begin);
            scales[t * strips + i] = row.data()[i].scale;
        }
    }
    return nb::make_tuple(results[0], results[1], results[2]);
}

}  // namespace

void bind_hooks(nb::module_& m) {
    m.def("integer_product", &integer_product, "layout"_a, "data"_a, "rows"_a, "cols"_a, "x"_a, "isa"_a = "",
          "Exact int32 [tokens, rows] product of packed weights and int8 x [tokens, cols].");
    m.def("quantize", &quantize, "x"_a, "activations"_a, "isa"_a = "", "int8 codes and float32 scales of each row.");
    m.def("quantize_on_grid", &quantize_on_grid, "x"_a, "grid"_a, "int8 codes, scales of 32 columns, shifts of rows.");
    m.def("apply", &apply, "runner"_a, "linear"_a, "x"_a, "linear(x) for float32 x [tokens, columns].");

    m.def("attention", &attention, "q"_a, "k"_a, "v"_a, "inverse_frequencies"_a, "kv_bits"_a, "threads"_a = 0,
          "isa"_a = "", "Causal attention of one layer with rotary embedding; float32 [tokens, heads, head_dim].");
}

}  // namespace tritkit

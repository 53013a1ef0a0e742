// Attention and the whole forward step.
#include <cmath>
#include <cstring>

#include "decoder.h"
#include "test_support.h"

using namespace tritkit;

/// The exponential behind silu, softmax and likelihoods: silu(x) / x = 1 / (1 + e^-x), against the library's.
void test_exp(const char* isa) {
    for (float x = -80.0f; x < 80.0f; x += 0.0371f) {
        float found = x;
        const float one = 1.0f;
        kernels_for(isa).vectors->silu_gate(&found, &one, 1);
        const double expected = x / (1.0 + std::exp(-static_cast<double>(x)));
        expect(std::fabs(found - expected) <= 4e-7 * std::fabs(expected), "exp", isa, 1, 1, 1);
    }
}

namespace {

Rotary rotary(int head_dim) {
    Rotary r;
    for (int i = 0; i < head_dim; i += 2)
        r.frequencies.push_back(static_cast<float>(std::pow(10000.0, -static_cast<double>(i) / head_dim)));
    return r;
}

/// Attention of random tokens: [token, heads * head_dim]. `cuts` cuts the prompt into steps.
std::vector<float> attention(const char* isa, const HeadShape& shape, int bits, int tokens, int threads,
                             std::vector<int> cuts) {
    random_numbers.seed(static_cast<unsigned>(shape.head_dim + bits + tokens));
    const int q_size = shape.heads * shape.head_dim, kv_size = shape.kv_heads * shape.head_dim, layers = 2;
    auto random_rows = [&](int size) {
        std::vector<float> rows(static_cast<size_t>(tokens * size));
        for (float& value : rows) value = random_float();
        return rows;
    };
    const std::vector<float> q = random_rows(q_size), k = random_rows(kv_size), v = random_rows(kv_size);
    std::vector<float> out(q.size() * layers);
    KvPages pages(layers, shape.kv_heads, shape.head_dim, bits);
    Attention attention(shape, rotary(shape.head_dim), pages, kernels_for(isa), threads);
    Pool pool(threads);
    const int sequence = pages.create();
    cuts.push_back(tokens);
    for (int begin = 0, i = 0; begin < tokens; begin = cuts[static_cast<size_t>(i)], ++i) {
        const int count = cuts[static_cast<size_t>(i)] - begin;
        pages.reserve(sequence, count);
        std::vector<Token> step;
        for (int t = 0; t < count; ++t) step.push_back({0, &pages.at(sequence), begin + t});
        attention.prepare(step, layers);
        pool.run([&](Team& team) {
            for (int layer = 0; layer < layers; ++layer) {
                attention.store(team, layer, q.data() + begin * q_size, k.data() + begin * kv_size,
                                v.data() + begin * kv_size);
                team.barrier();
                attention.attend(team, layer, out.data() + (layer * tokens + begin) * q_size, q_size);
                team.barrier();
            }
        });
        pages.advance(sequence, count);
    }
    return out;
}

}  // namespace

/// The same bits on every instruction set, with any number of threads, and however the prompt is cut.
void test_attention() {
    const HeadShape shapes[] = {{4, 2, 10}, {3, 1, 34}, {5, 5, 16}, {4, 2, 64}, {4, 1, 128}, {40, 1, 2}};
    for (const HeadShape& shape : shapes) {
        for (int bits : {32, 16, 8, 4, 3}) {
            for (int tokens : {1, 70, 270}) {
                const std::vector<float> expected = attention("scalar", shape, bits, tokens, 1, {});
                for (const std::string& isa : available_isas()) {
                    auto check = [&](int threads, std::vector<int> cuts) {
                        const std::vector<float> found =
                            attention(isa.c_str(), shape, bits, tokens, threads, std::move(cuts));
                        expect(!std::memcmp(found.data(), expected.data(), found.size() * sizeof(float)), "attention",
                               isa.c_str(), bits, shape.head_dim, tokens);
                    };
                    if (tokens == 1) check(3, {});
                    if (tokens == 70) check(2, {1, 2, 5, 64, 65});
                    if (tokens == 270) check(3, {250, 257, 269});
                }
            }
        }
    }
}

namespace {

/// Two layers of ternary weights, sub-norms and a table of float rows that is also the head.
std::unique_ptr<Decoder> small_decoder(int threads, const char* isa, const std::vector<uint8_t>& table,
                                       const char* ternary = "") {
    constexpr int kVocab = 100, kHidden = 48, kInner = 80;
    random_numbers.seed(7);
    auto runner = std::make_shared<Runner>(threads, isa, ternary);
    auto linear = [&](int rows, int columns, Skip skip = Skip::kNothing) {
        const std::vector<uint8_t> source = random_source(source_layout("hf_bitlinear"), rows, columns, -1);
        return make_linear(stored(source_layout("hf_bitlinear"), source, rows, columns), runner->ternary, skip, 0.05f,
                           "a8", nullptr, runner->pool, runner->arena, runner->kernels);
    };
    const DecoderShape shape{kVocab, kHidden, kInner, {4, 2, 12}, rotary(12), 1e-5f, Gate::kRelu2, 400};
    std::vector<Layer> layers;
    for (int i = 0; i < 2; ++i)
        layers.push_back({linear(48, kHidden),
                          linear(24, kHidden),
                          linear(24, kHidden),
                          linear(kHidden, 48),
                          linear(kInner, kHidden),
                          linear(kInner, kHidden, Skip::kOutputs),
                          linear(kHidden, kInner, Skip::kInputs),
                          Norm(kHidden, 1.0f),
                          Norm(kHidden, 0.9f),
                          Norm(48, 1.1f),
                          Norm(kInner, 1.0f),
                          Norm(12, 1.1f),
                          Norm(12, 0.9f),
                          {}});
    const Stored rows = stored(source_layout("f32"), table, kVocab, kHidden);
    auto exact = std::make_shared<FloatLinear>(rows, 1.0f, nullptr, runner->pool, runner->arena, runner->kernels);
    auto head = std::make_shared<Head>(exact);
    auto embedding = std::make_shared<StoredRows>(rows, 1.0f);
    return std::make_unique<Decoder>(runner, shape, embedding, std::move(layers), Norm(kHidden, 1.0f), head, 16);
}

/// Logits of a prompt and of some tokens behind it, one by one, in a sequence of its own.
std::vector<float> run_decoder(Decoder& decoder) {
    std::vector<int32_t> tokens;
    for (int i = 0; i < 90; ++i) tokens.push_back((i * i + 3) % 100);
    std::vector<float> logits(tokens.size() * 100);
    const int first = decoder.create();
    decoder.step({{first, tokens.data(), 60, Want::kAll, nullptr, logits.data()}});
    const int sequence = decoder.fork(first);
    decoder.free(first);
    for (int t = 60; t < 90; ++t)
        decoder.step({{sequence, tokens.data() + t, 1, Want::kLast, nullptr, logits.data() + 100 * t}});
    decoder.free(sequence);
    return logits;
}

std::vector<uint8_t> random_table() {
    std::vector<uint8_t> table(4 * 100 * 48);
    random_numbers.seed(3);
    for (size_t i = 0; i < table.size(); i += 4) {
        const float value = random_float();
        std::memcpy(table.data() + i, &value, 4);
    }
    return table;
}

}  // namespace

/// What a decoder does not read changes nothing.
void test_sparse_decoder(const char* isa) {
    const std::vector<uint8_t> table = random_table();
    const std::vector<float> expected = run_decoder(*small_decoder(1, isa, table, "t16_2"));
    for (int threads : {1, 3}) {
        const auto decoder = small_decoder(threads, isa, table, "l64_3");
        expect(run_decoder(*decoder) == expected, "sparse decoder", isa, threads, 0, 90);
        expect(decoder->density().up < 0.7 && decoder->density().down <= decoder->density().up, "density", isa, threads,
               0, 90);
    }
}

/// However many threads a decoder has, and however many use it, the numbers are the same.
void test_decoder(const char* isa) {
    const std::vector<uint8_t> table = random_table();
    const std::vector<float> expected = run_decoder(*small_decoder(1, isa, table));
    for (int threads : {2, 3}) {
        const auto decoder = small_decoder(threads, isa, table), other = small_decoder(threads, isa, table);
        std::vector<std::vector<float>> found(4);
        std::vector<std::thread> users;
        for (size_t i = 0; i < found.size(); ++i)
            users.emplace_back([&, i] { found[i] = run_decoder(i % 2 ? *decoder : *other); });
        for (std::thread& user : users) user.join();
        for (const std::vector<float>& logits : found) expect(logits == expected, "decoder", isa, threads, 0, 90);
    }
}

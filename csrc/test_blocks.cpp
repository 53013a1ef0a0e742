// Blocks of ggml, ternary blocks and floats: products against scalar, and the quantizers of ggml.
#include <chrono>
#include <cmath>
#include <cstring>

#include "decoder.h"
#include "floats.h"
#include "ggml_quantize.h"
#include "grouped.h"
#include "test_support.h"

using namespace tritkit;

namespace {

void put_half(uint8_t* at, float value) {
    const uint16_t half = f16_from_float(value);
    std::memcpy(at, &half, 2);
}

/// Where blocks of ggml have their float16 numbers.
std::vector<int> half_places(const std::string& name) {
    if (name == "q2_k") return {80, 82};
    if (name == "q3_k") return {108};
    if (name == "q6_k") return {208};
    if (name == "tq1_0") return {52};
    if (name == "tq2_0") return {64};
    if (name == "q4_0" || name == "q5_0" || name == "q8_0") return {0};
    if (name == "q4_1" || name == "q5_1" || name == "q4_k" || name == "q5_k") return {0, 2};
    return {};
}

/// Random blocks, without a byte more than there are; ternary: codes 0, 1 and 2, and the scale one.
std::vector<uint8_t> random_blocks(const SourceLayout& layout, int rows, int columns, bool ternary) {
    std::vector<uint8_t> bytes(static_cast<size_t>(layout.source_bytes(rows, columns)));
    for (uint8_t& byte : bytes) {
        byte = static_cast<uint8_t>(random_int(0, 255));
        if (ternary) byte = static_cast<uint8_t>(byte & 0xaa ? byte & 0xaa : byte & 0x55);
    }
    for (size_t at = 0; at < bytes.size(); at += static_cast<size_t>(layout.block_bytes))
        for (int place : half_places(layout.name))
            put_half(bytes.data() + at + static_cast<size_t>(place), ternary ? 1.0f : 0.01f * random_float());
    return bytes;
}

/// linear(x) of random tokens, by two threads, the rows dealt out as the decoder does.
std::vector<float> random_product(const Linear& linear, Runner& runner, int tokens, Activations& x) {
    x.reserve(linear.activations());
    for (int t = 0; t < tokens; ++t) {
        for (int k = 0; k < linear.columns(); ++k) x.row(t)[k] = random_float();
        x.quantize(t, runner.kernels, {});
    }
    std::vector<float> out(static_cast<size_t>(tokens) * linear.rows());
    std::vector<Linear::Scratch> scratches(2);
    for (Linear::Scratch& scratch : scratches) linear.reserve(tokens, 2, scratch);
    runner.pool.run([&](Team& team) {
        Linear::Scratch& scratch = scratches[static_cast<size_t>(team.rank)];
        Chunks chunks(team, linear.rows(), linear.rows_together());
        for (Range rows = chunks.next(); !rows.empty(); rows = chunks.next())
            linear.apply(rows, x, tokens, out.data(), linear.rows(), Linear::Write::kStore, scratch);
    });
    return out;
}

}  // namespace

/// The products of blocks are those of the rows that they stand for, on every instruction set the same.
void test_blocks(const char* isa) {
    for (const BlockType& type : block_types()) {
        const SourceLayout& layout = source_layout(type.name);
        for (const auto& [rows, blocks] : {std::pair{1, 1}, {17, 3}, {50, 9}}) {
            const int columns = blocks * type.columns, tokens = blocks + 1;
            random_numbers.seed(static_cast<unsigned>(rows + columns));
            const std::vector<uint8_t> source = random_blocks(layout, rows, columns, false);
            const Stored matrix = stored(layout, source, rows, columns);
            std::vector<float> products[2];
            Activations x(tokens, columns);
            for (int i = 0; i < 2; ++i) {
                random_numbers.seed(1);
                Runner runner(2, i ? "scalar" : isa);
                const GroupedLinear linear(BlockSource(matrix), 1.0f, nullptr, runner.pool, runner.arena,
                                           runner.kernels);
                products[i] = random_product(linear, runner, tokens, x);
            }
            expect(products[0] == products[1], type.name, isa, rows, columns, tokens);
            bool near = true;
            const StoredRows table(matrix, 1.0f);
            for (int r = 0; r < rows; ++r) {
                std::vector<float> row(static_cast<size_t>(columns));
                table.copy_row(r, row.data());
                for (int t = 0; t < tokens; ++t) {
                    double sum = 0.0, size = 0.0;
                    for (int k = 0; k < columns; ++k) {
                        const ActivationStrip& strip = x.strips()[t * x.strip_stride() + k / kStripColumns];
                        const double product = row[static_cast<size_t>(k)] * strip.scale *
                                               static_cast<double>(strip.codes[k % kStripColumns]);
                        sum += product;
                        size += std::fabs(product);
                    }
                    // Float sums of integer sums; an offset may be some ten times as large as what is left.
                    near =
                        near && std::fabs(sum - products[0][static_cast<size_t>(t * rows + r)]) <= 1e-4 * size + 1e-6;
                }
            }
            expect(near, "values of blocks", type.name, rows, columns, tokens);
        }
    }
}

/// Ternary blocks in every run-time layout; scales and codes that do not fit are refused.
void test_ternary_blocks() {
    Pool pool(3);
    Arena arena;
    for (const BlockType& type : block_types()) {
        if (!type.ternary()) continue;
        const SourceLayout& layout = source_layout(type.name);
        for (const auto& [rows, blocks] : {std::pair{1, 1}, {16, 5}, {100, 6}, {33, 41}}) {
            const int columns = blocks * type.columns;
            std::vector<uint8_t> source = random_blocks(layout, rows, columns, true);
            const StoredRows table(stored(layout, source, rows, columns), 1.0f);
            for (Runtime runtime : {Runtime::kTernary, Runtime::kTernary3}) {
                const Bytes packed = repack(stored(layout, source, rows, columns), runtime, 1.0f, pool, arena);
                bool good = true;
                std::vector<float> row(static_cast<size_t>(columns));
                for (int r = 0; r < rows; ++r) {
                    const uint8_t* tile = packed.data() + r / 16 * tile_bytes(runtime, columns);
                    table.copy_row(r, row.data());
                    for (int k = 0; k < columns; ++k)
                        good = good && row[static_cast<size_t>(k)] ==
                                           static_cast<float>(runtime_code(runtime, tile, r % 16, k) - 1);
                }
                expect(good, type.name, "repack", rows, columns, static_cast<int>(runtime));
            }
            auto refused = [&](float scale) {
                try {
                    repack(stored(layout, source, rows, columns), Runtime::kTernary, scale, pool, arena);
                } catch (const std::invalid_argument&) {
                    return true;
                }
                return false;
            };
            expect(refused(2.0f) == type.has_scale, type.name, "other scale", rows, columns, 0);
            if (std::strcmp(type.name, "tq1_0")) {
                source[0] = 255;
                expect(refused(1.0f), type.name, "other code", rows, columns, 0);
            }
        }
    }
}

namespace {

std::vector<float> float_product(const char* layout, const char* isa, int rows, int columns, int tokens) {
    random_numbers.seed(static_cast<unsigned>(rows + columns + tokens));
    Runner runner(2, isa);
    std::vector<uint8_t> source(static_cast<size_t>(source_layout(layout).source_bytes(rows, columns)));
    for (int i = 0; i < rows * columns; ++i) {
        const float value = random_float();
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        // As float16: a sign, exponents around 1, any mantissa.
        const uint16_t half =
            static_cast<uint16_t>(!std::strcmp(layout, "bf16") ? bits >> 16 : (bits & 0xb7ff) | 0x2000);
        if (!std::strcmp(layout, "f32"))
            std::memcpy(source.data() + 4 * i, &value, 4);
        else
            std::memcpy(source.data() + 2 * i, &half, 2);
    }
    const FloatLinear linear(stored(source_layout(layout), source, rows, columns), 1.0f, nullptr, runner.pool,
                             runner.arena, runner.kernels);
    Activations x(tokens, columns);
    return random_product(linear, runner, tokens, x);
}

}  // namespace

void test_floats(const char* isa) {
    constexpr float kTolerance = 1e-3f;  // sums of 300 products of standard normals, in two orders
    for (const char* layout : {"f32", "f16", "bf16"}) {
        for (int tokens : {1, 2, 3, 4, 7}) {
            const int rows = random_int(1, 150), columns = random_int(1, 300);
            const auto a = float_product(layout, isa, rows, columns, tokens);
            const auto b = float_product(layout, "scalar", rows, columns, tokens);
            bool good = true;
            for (size_t i = 0; i < a.size(); ++i) good = good && std::fabs(a[i] - b[i]) <= kTolerance;
            expect(good, layout, isa, rows, columns, tokens);
        }
    }
}

/// Vectors of kernels that are written once: the same bits everywhere. The lengths do not fill the vectors.
void test_vectors(const char* isa) {
    const VectorKernels &a = *kernels_for(isa).vectors, &b = *kernels_for("scalar").vectors;
    for (int n : {1, 2, 15, 16, 17, 63, 64, 100, 1023, 1025, 2560}) {
        for (float size : {1e-20f, 1.0f, 30.0f, 1e20f}) {
            std::vector<float> x(static_cast<size_t>(n)), weight(x.size());
            for (float& value : x) value = random_float() * size;
            for (float& value : weight) value = random_float();
            auto same = [&](auto run, const char* what) {
                std::vector<float> by_a = x, by_b = x;
                run(a, by_a.data());
                run(b, by_b.data());
                expect(!std::memcmp(by_a.data(), by_b.data(), x.size() * sizeof(float)), what, isa, 1, n, 1);
            };
            same([&](const VectorKernels& k, float* y) { k.rms_norm(y, weight.data(), n, 1e-5f, y); }, "rms_norm");
            same([&](const VectorKernels& k, float* y) { k.silu_gate(y, weight.data(), n); }, "silu_gate");
            same([&](const VectorKernels& k, float* y) { k.relu2_gate(y, weight.data(), n); }, "relu2_gate");
            expect(a.log_sum_exp(x.data(), n) == b.log_sum_exp(x.data(), n), "log_sum_exp", isa, 1, n, 1);
            for (int bits : {16, 8, 4, 3}) {
                std::vector<uint16_t> codes_a(static_cast<size_t>(round_up(n, kLanes))), codes_b = codes_a;
                const bool good =
                    a.encode(x.data(), n, bits, codes_a.data()) == b.encode(x.data(), n, bits, codes_b.data());
                expect(good && codes_a == codes_b, "encode", isa, bits, n, 1);
            }
        }
    }
}

/// Bytes of every type of ggml for the same weights on every CPU, as a hash (FNV-1a). On x86-64 they are llama.cpp's
/// (tests/test_search.py), so these numbers say that they are that everywhere.
void test_quantizers() {
    struct Expected {
        const char* name;
        uint64_t plain, weighed;
    };
    static const Expected all[] = {
        {"q4_0", 0x6a22d5478910be84, 0x979b73dd7b5c9f55},  {"q4_1", 0x8f97342f3e17085e, 0xcf7c0c51ec9f810e},
        {"q5_0", 0xdd2afcee7160f304, 0xe45d5ad29b7e4481},  {"q5_1", 0x65ea0f3ffe8dd9cf, 0x13df472ee54a948f},
        {"q8_0", 0x713de6546fe07c51, 0x713de6546fe07c51},  {"q2_k", 0x3d9c65c0e6aa3666, 0x4d89f36edc50a737},
        {"q3_k", 0x105c5d671838c971, 0xa7fb0c8fc43bcd71},  {"q4_k", 0xdf9bedd252c96738, 0xe9bef92dcb8a61a9},
        {"q5_k", 0xf0b4b1a9f7859864, 0x69f57dd0863a78d2},  {"q6_k", 0x6a4868bd01cf8cc3, 0x10c299f4bca6b074},
        {"tq1_0", 0xa6432c2b3b8b1157, 0xa6432c2b3b8b1157}, {"tq2_0", 0x67348f0739d5cdf4, 0x67348f0739d5cdf4},
    };
    constexpr int rows = 24, columns = 768;
    uint64_t state = 1;
    const auto uniform = [&] {  // in (-1, 1), whole multiples of 2^-23
        state = state * 6364136223846793005u + 1442695040888963407u;
        return (static_cast<float>(state >> 40) - 8388607.5f) * 0x1p-23f;
    };
    std::vector<float> x(rows * columns), importance(columns);
    for (float& value : x) {
        const float u = uniform(), v = uniform();
        value = u * v * v * 0.125f;
    }
    for (int k = 0; k < columns; ++k) x[static_cast<size_t>(3 * columns + k)] = k % 100 ? 0.0f : 1.0f;
    for (float& value : importance) value = std::max(uniform(), 0.0f);
    Pool pool(2);
    for (const Expected& expected : all)
        for (const ggml::Quantizer& quantizer : ggml::quantizers()) {
            if (std::strcmp(quantizer.name, expected.name)) continue;
            const BlockType& type = *ggml::find_block_type(quantizer.name);
            std::vector<uint8_t> bytes(static_cast<size_t>(rows * (columns / type.columns) * type.bytes));
            for (const bool weighed : {false, true}) {
                const float* weights = weighed ? importance.data() : nullptr;
                ggml::quantize_rows(quantizer, x.data(), weights, rows, columns, bytes.data(), pool);
                uint64_t hash = 14695981039346656037u;
                for (uint8_t byte : bytes) hash = (hash ^ byte) * 1099511628211u;
                const uint64_t wanted = weighed ? expected.weighed : expected.plain;
                if (hash != wanted)
                    std::printf("%s%s: 0x%016llx\n", type.name, weighed ? ", weighed" : "",
                                static_cast<unsigned long long>(hash));
                expect(hash == wanted, "the bytes of a quantizer", type.name, rows, columns, 0);
            }
        }
}

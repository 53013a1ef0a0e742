// Every instruction set against scalar: random and extreme inputs, odd sizes. No Python, so that sanitizers and
// emulators can run it. Says what differs; the exit status is the number of kernels that do.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "decoder.h"
#include "floats.h"
#include "ggml_quantize.h"
#include "grouped.h"
#include "test_support.h"

using namespace tritkit;

std::mt19937 random_numbers(1);
int failures = 0;

namespace {

/// Bytes of a file with random codes, or with one code everywhere.
std::vector<uint8_t> random_source(const SourceLayout& layout, int rows, int columns, int code) {
    std::vector<uint8_t> bytes(static_cast<size_t>(layout.source_bytes(rows, columns)));
    for (uint8_t& byte : bytes) {
        if (layout.runtime == Runtime::kBinary)
            byte = static_cast<uint8_t>(code < 0 ? random_int(0, 255) : 255 * (code > 0));
        else
            for (int i = 0; i < 4; ++i) byte = static_cast<uint8_t>(byte << 2 | (code < 0 ? random_int(0, 2) : code));
    }
    return bytes;
}

Stored stored(const SourceLayout& layout, const std::vector<uint8_t>& source, int rows, int columns) {
    return {layout, Bytes(nullptr, source.data(), source.size()), rows, columns};
}

/// Codes, one by one, as the definitions of the file layouts say.
int source_code(const SourceLayout& layout, const std::vector<uint8_t>& source, int rows, int columns, int r, int k) {
    if (layout.runtime == Runtime::kBinary)
        return source[static_cast<size_t>(r * ((columns + 7) / 8) + k / 8)] >> k % 8 & 1;
    const int packed_rows = (rows + 3) / 4;
    return source[static_cast<size_t>(r % packed_rows * columns + k)] >> 2 * (r / packed_rows) & 3;
}

/// Codes as the drawings of the run-time layouts in kernels.h say.
int runtime_code(Runtime runtime, const uint8_t* tile, int r, int k) {
    auto byte = [&](int block_columns) { return tile[k / block_columns * kBlockBytes + 4 * r + k % 4]; };
    if (runtime == Runtime::kTernary) return byte(16) >> 2 * (k / 4 % 4) & 3;
    if (runtime == Runtime::kBinary) return byte(32) >> k / 4 % 8 & 1;
    int fraction = byte(20);  // of 256: each digit comes out at the top when multiplied by 3
    for (int f = 0; f < k / 4 % 5; ++f) fraction = fraction * 3 % 256;
    return fraction * 3 / 256;
}

void test_repack() {
    Pool pool(3);
    Arena arena;
    const std::pair<const char*, Runtime> ways[] = {
        {"hf_bitlinear", Runtime::kTernary}, {"hf_bitlinear", Runtime::kTernary3}, {"binary_rows", Runtime::kBinary}};
    for (const auto& [name, runtime] : ways) {
        for (const auto& [rows, columns] :
             {std::pair{1, 1}, {16, 40}, {64, 320}, {100, 321}, {192, 1003}, {130, 639}}) {
            const SourceLayout& layout = source_layout(name);
            const std::vector<uint8_t> source = random_source(layout, rows, columns, -1);
            const Bytes packed = repack(stored(layout, source, rows, columns), runtime, 1.0f, pool, arena);
            bool good = true;
            for (int r = 0; r < rows; ++r)
                for (int k = 0; k < columns; ++k)
                    good = good &&
                           source_code(layout, source, rows, columns, r, k) ==
                               runtime_code(runtime, packed.data() + r / 16 * tile_bytes(runtime, columns), r % 16, k);
            expect(good, name, "repack", rows, columns, static_cast<int>(runtime));
        }
    }
}

/// Rows of a table that lies on odd bytes; and what a linear refuses.
void test_rows() {
    for (const auto& [name, layout] :
         {std::pair{"f32", Runtime::kF32}, {"f16", Runtime::kF16}, {"bf16", Runtime::kBf16}}) {
        const int size = float_bytes(layout);
        std::vector<uint8_t> bytes(static_cast<size_t>(1 + 7 * 21 * size));
        const uint32_t one = layout == Runtime::kF32 ? 0x3f800000u : layout == Runtime::kF16 ? 0x3c00u : 0x3f80u;
        for (int i = 0; i < 7 * 21; ++i)
            if (i % 3 == 0) std::memcpy(bytes.data() + 1 + i * size, &one, static_cast<size_t>(size));
        const StoredRows table({source_layout(name), Bytes(nullptr, bytes.data() + 1, bytes.size() - 1), 7, 21}, 0.5f);
        bool good = true;
        for (int r = 0; r < 7; ++r) {
            float row[21];
            table.copy_row(r, row);
            for (int k = 0; k < 21; ++k) good = good && row[k] == ((21 * r + k) % 3 ? 0.0f : 0.5f);
        }
        expect(good, name, "rows", 7, 21, 1);
    }
    bool refused = false;
    try {
        Runner runner(1, "scalar");
        const std::vector<uint8_t> source(static_cast<size_t>(4 * (kMaxColumns + 1)), 0x55);
        const TileLinear linear(stored(source_layout("hf_bitlinear"), source, 16, kMaxColumns + 1), Runtime::kTernary,
                                1.0f, "a8", nullptr, runner.pool, runner.arena, runner.kernels);
    } catch (const std::invalid_argument&) {
        refused = true;
    }
    expect(refused, "too many columns", "scalar", 16, kMaxColumns + 1, 1);
}

/// value: of all activations, or 1000 for random ones. code: of all weights, or -1 for random ones.
std::vector<int32_t> integer_product(const char* layout, const char* isa, int rows, int columns, int tokens, int value,
                                     int code) {
    random_numbers.seed(static_cast<unsigned>(rows * 31 + columns * 7 + tokens));
    Runner runner(2, isa);
    const std::vector<uint8_t> source = random_source(source_layout(layout), rows, columns, code);
    const TileLinear linear(stored(source_layout(layout), source, rows, columns), source_layout(layout).runtime, 1.0f,
                            "a8", nullptr, runner.pool, runner.arena, runner.kernels);
    const ptrdiff_t stride = code_stride(columns), out_stride = round_up(rows, kTileRows);
    AlignedArray<int8_t> codes(static_cast<size_t>(tokens * stride));
    std::vector<int32_t> sums(static_cast<size_t>(tokens)), out(static_cast<size_t>(tokens * out_stride));
    for (int t = 0; t < tokens; ++t) {
        for (int k = 0; k < columns; ++k) {
            const int x = value == 1000 ? random_int(-128, 127) : value;
            codes[static_cast<size_t>(t * stride + k)] = static_cast<int8_t>(x);
            sums[static_cast<size_t>(t)] += x;
        }
    }
    Linear::Scratch scratch;
    linear.reserve(tokens, 1, scratch);
    linear.integer_product({0, rows}, codes.data(), stride, sums.data(), tokens, out.data(), out_stride,
                           scratch.panel.data());
    std::vector<int32_t> result;  // without the rows that are padding
    for (int t = 0; t < tokens; ++t)
        result.insert(result.end(), out.data() + t * out_stride, out.data() + t * out_stride + rows);
    return result;
}

void test_integers(const char* isa) {
    for (const char* layout : {"hf_bitlinear", "binary_rows"}) {
        for (int i = 0; i < 40; ++i) {
            const int rows = random_int(1, 200), columns = random_int(1, 700), tokens = 1 + i % 20;
            expect(integer_product(layout, isa, rows, columns, tokens, 1000, -1) ==
                       integer_product(layout, "scalar", rows, columns, tokens, 1000, -1),
                   layout, isa, rows, columns, tokens);
        }
        for (int tokens : {1, 2, 4, 8}) {
            for (int value : {-128, 127}) {
                for (int code : {0, 1, 2}) {
                    // code - 1 (ternary), or -1 and +1 (binary, where every code but 0 is +1)
                    const bool binary = !std::strcmp(layout, "binary_rows");
                    const int weight = binary ? (code ? 1 : -1) : code - 1;
                    const std::vector<int32_t> expected(static_cast<size_t>(tokens) * 80, weight * value * 16384);
                    expect(integer_product(layout, isa, 80, 16384, tokens, value, code) == expected, layout, isa, 80,
                           16384, tokens);
                }
            }
        }
    }
}

/// The kernels over packed bytes, whatever these mean: random ones, and those with the largest codes.
std::vector<int32_t> tile_product(const char* isa, TileLayout layout, int tiles, int columns, int tokens, bool extreme,
                                  bool panel) {
    random_numbers.seed(static_cast<unsigned>(tiles * 31 + columns * 7 + tokens));
    const int blocks = blocks_of(layout, columns);
    AlignedArray<uint8_t> weights(static_cast<size_t>(tiles * blocks * kBlockBytes));
    // Five trits reach 255 only as ceil(242 / 243 * 256).
    for (size_t i = 0; i < weights.size(); ++i) weights[i] = static_cast<uint8_t>(extreme ? 255 : random_int(0, 255));
    const ptrdiff_t stride = code_stride(columns);
    AlignedArray<int8_t> codes(static_cast<size_t>(tokens * stride));
    std::vector<int32_t> sums(static_cast<size_t>(tokens)), out(static_cast<size_t>(tokens * tiles * kTileRows), 5);
    for (int t = 0; t < tokens; ++t)
        for (int k = 0; k < columns; ++k) {
            const int x = extreme ? (t % 2 ? 127 : -128) : random_int(-128, 127);
            codes[static_cast<size_t>(t * stride + k)] = static_cast<int8_t>(x);
            sums[static_cast<size_t>(t)] += x;
        }
    AlignedArray<uint8_t> scratch(static_cast<size_t>(kPanelTiles * kTileRows * stride));
    kernels_for(isa).matmul_tiles[static_cast<int>(layout)]({weights.data(), blocks, 0, tiles, codes.data(), stride,
                                                             sums.data(), tokens, out.data(), tiles * kTileRows, 1, 3,
                                                             tokens % 2 == 0, panel ? scratch.data() : nullptr});
    return out;
}

void test_tiles(const char* isa) {
    for (int i = 0; i < kTileLayouts; ++i) {
        const TileLayout layout = static_cast<TileLayout>(i);
        for (int tokens = 1; tokens <= 40; ++tokens) {
            const int tiles = random_int(1, 13), columns = random_int(1, 700);
            for (bool panel : {false, true})
                expect(tile_product(isa, layout, tiles, columns, tokens, false, panel) ==
                           tile_product("scalar", layout, tiles, columns, tokens, false, panel),
                       facts(layout).name, isa, tiles * kTileRows, columns, tokens);
        }
        for (int tokens : {1, 2, 4, 8, 13})
            expect(tile_product(isa, layout, 3, kMaxColumns, tokens, true, true) ==
                       tile_product("scalar", layout, 3, kMaxColumns, tokens, true, true),
                   facts(layout).name, isa, 3 * kTileRows, kMaxColumns, tokens);
    }
}

/// The products of lines over random or the largest bytes: rows, some columns, all columns, one after the other.
std::vector<int32_t> line_product(const char* isa, int lines, int vectors, int tokens, int of_ten, bool extreme) {
    random_numbers.seed(static_cast<unsigned>(lines * 31 + vectors * 7 + tokens));
    const ptrdiff_t stride = lines * kBlockBytes, entries = ptrdiff_t{lines} * kLineEntries;
    const ptrdiff_t columns = code_stride(vectors), room = round_up(vectors, kTileRows);
    AlignedArray<uint8_t> weights(static_cast<size_t>(vectors * stride));
    for (size_t i = 0; i < weights.size(); ++i) weights[i] = static_cast<uint8_t>(extreme ? 255 : random_int(0, 255));
    std::vector<int32_t> list;
    for (int i = 0; i < vectors; ++i)
        if (random_int(0, 9) < of_ten) list.push_back(i);
    auto codes_of = [&](int n, ptrdiff_t code_stride, std::vector<int32_t>& sums) {
        AlignedArray<int8_t> codes(static_cast<size_t>(tokens * code_stride));
        for (int t = 0; t < tokens; ++t) {
            sums.push_back(0);
            for (int k = 0; k < n; ++k) {
                const int x = extreme ? (t % 2 ? 127 : -128) : random_int(-128, 127);
                codes[static_cast<size_t>(t * code_stride + k)] = static_cast<int8_t>(x);
                sums.back() += x;
            }
        }
        return codes;
    };
    std::vector<int32_t> row_sums, column_sums;
    const AlignedArray<int8_t> for_rows = codes_of(std::min(static_cast<int>(entries), kMaxColumns), entries, row_sums),
                               for_columns = codes_of(vectors, columns, column_sums);
    AlignedArray<uint8_t> scratch(static_cast<size_t>(line_scratch(lines, tokens)));
    std::vector<int32_t> out(static_cast<size_t>(tokens * (room + 2 * entries)), 5);
    LineProduct p{weights.data(),
                  stride,
                  lines,
                  list.data(),
                  static_cast<int>(list.size()),
                  for_rows.data(),
                  entries,
                  row_sums.data(),
                  tokens,
                  out.data(),
                  room,
                  scratch.data()};
    const LineKernels& kernels = *kernels_for(isa).lines;
    kernels.multiply_rows(p);
    p.codes = for_columns.data();
    p.code_stride = columns;
    p.sums = column_sums.data();
    p.out += tokens * room;
    p.out_stride = entries;
    if (tokens <= kLineTokens) kernels.add_columns(p);
    p.list = nullptr;
    p.count = vectors;
    p.out += tokens * entries;
    kernels.multiply_columns(p);
    return out;
}

void test_lines(const char* isa) {
    for (int tokens = 1; tokens <= 20; ++tokens)
        for (int of_ten : {0, 2, 9, 10}) {
            const int lines = random_int(1, 3), vectors = random_int(1, 300) * (tokens % 7 ? 1 : 4);
            expect(line_product(isa, lines, vectors, tokens, of_ten, false) ==
                       line_product("scalar", lines, vectors, tokens, of_ten, false),
                   "lines", isa, vectors, lines, tokens);
        }
    const int most = lines_of(kMaxColumns);
    for (int tokens : {1, 3, 5}) {
        expect(line_product(isa, most, 5, tokens, 10, true) == line_product("scalar", most, 5, tokens, 10, true),
               "long rows", isa, 5, most, tokens);
        expect(line_product(isa, 1, kMaxColumns, tokens, 10, true) ==
                   line_product("scalar", 1, kMaxColumns, tokens, 10, true),
               "many columns", isa, kMaxColumns, 1, tokens);
    }
    for (int n : {1, 15, 16, 100, 1000}) {
        std::vector<float> x(static_cast<size_t>(n));
        std::vector<int8_t> codes(x.size());
        for (float& value : x) value = random_int(0, 9) ? random_float() : NAN;
        for (int8_t& code : codes) code = static_cast<int8_t>(random_int(0, 1) * random_int(-128, 127));
        std::vector<int32_t> lists[4];
        for (int i = 0; i < 4; ++i) {
            const LineKernels& kernels = *kernels_for(i % 2 ? "scalar" : isa).lines;
            std::vector<int32_t>& list = lists[i];
            list.resize(x.size() + 15);
            list.resize(static_cast<size_t>(i < 2 ? kernels.list_above(x.data(), n, 0.1f, 7, list.data())
                                                  : kernels.list_nonzero(codes.data(), n, list.data())));
        }
        expect(lists[0] == lists[1] && lists[2] == lists[3], "lists", isa, n, 0, 0);
    }
}

/// Linears in lines against one in tiles, of every shape and number of tokens.
void test_line_linears(const char* isa) {
    Runner runner(2, isa);
    const SourceLayout& layout = source_layout("hf_bitlinear");
    for (const auto& [rows, columns] : {std::pair{1, 1}, {16, 40}, {64, 320}, {100, 321}, {320, 100}, {1283, 70}}) {
        const std::vector<uint8_t> source = random_source(layout, rows, columns, -1);
        std::vector<float> bias(static_cast<size_t>(rows));
        for (float& value : bias) value = random_float();
        auto make = [&](Lines lines, Skip skip) {
            return make_linear(stored(layout, source, rows, columns), {Runtime::kTernary, lines}, skip, 0.1f, "a8",
                               bias.data(), runner.pool, runner.arena, runner.kernels);
        };
        for (int tokens : {1, 2, 4, 5, 9}) {
            Activations x(tokens, columns);
            x.reserve(ActivationFormat::kA8);
            for (int t = 0; t < tokens; ++t) {
                for (int k = 0; k < columns; ++k) x.row(t)[k] = random_float();
                x.quantize(t, runner.kernels, {});
            }
            auto apply = [&](const std::shared_ptr<Linear>& linear) {
                std::vector<float> out(static_cast<size_t>(tokens * rows), 1.0f);
                Linear::Scratch scratch;
                linear->reserve(tokens, 1, scratch);
                const int cut = rows / 3 / kTileRows * kTileRows;
                for (Range part : {Range{0, cut}, Range{cut, rows}})
                    linear->apply(part, x, tokens, out.data(), rows, Linear::Write::kAdd, scratch);
                return out;
            };
            const std::vector<float> expected = apply(make(Lines::kNever, Skip::kNothing));
            expect(apply(make(Lines::kAlways, Skip::kOutputs)) == expected, "row linear", isa, rows, columns, tokens);
            expect(apply(make(Lines::kAlways, Skip::kInputs)) == expected, "column linear", isa, rows, columns, tokens);
        }
    }
}

void test_quantize(const char* isa) {
    for (int columns : {1, 5, 16, 17, 31, 200, 2560}) {
        for (float size : {1e-9f, 1.0f, 1e6f, NAN, INFINITY}) {
            std::vector<float> x(static_cast<size_t>(columns));
            for (float& value : x) value = random_float() * (std::isfinite(size) ? size : 1.0f);
            if (!std::isfinite(size)) x[static_cast<size_t>(columns / 2)] = size;
            std::vector<int8_t> a(x.size()), b(x.size());
            int32_t sum_a, sum_b;
            const float scale_a = kernels_for(isa).quantize_row(x.data(), columns, 127.0f, a.data(), &sum_a);
            const float scale_b = kernels_for("scalar").quantize_row(x.data(), columns, 127.0f, b.data(), &sum_b);
            expect(a == b && sum_a == sum_b && !std::memcmp(&scale_a, &scale_b, sizeof scale_a), "quantize_row", isa, 1,
                   columns, 1);
        }
    }
}

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

/// linear(x) of random tokens, by two threads.
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
        linear.apply(linear.share(team), x, tokens, out.data(), linear.rows(), Linear::Write::kStore, scratch);
    });
    return out;
}

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

/// Barriers of a pool keep every thread's writes before every other thread's reads; pauses let the threads sleep.
void test_pool() {
    for (int threads : {1, 2, 3, 8}) {
        Pool pool(threads);
        std::vector<int> counts(static_cast<size_t>(threads));
        bool good = true;
        for (int round = 0; round < 200; ++round) {
            if (round % 50 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
            pool.run([&](Team& team) {
                for (int i = 0; i < 5; ++i) {
                    ++counts[static_cast<size_t>(team.rank)];
                    team.barrier();
                    if (team.rank == 0)
                        for (int count : counts) good = good && count == counts[0];
                    team.barrier();
                }
            });
        }
        expect(good && counts[0] == 1000, "pool", "threads", threads, 0, 0);
    }
}

/// Every item is dealt out once, in loop after loop without a barrier, however long a thread stays away.
void test_chunks() {
    for (int threads : {1, 2, 3, 8}) {
        Pool pool(threads);
        for (const auto& work : {std::pair{0, 4}, {1, 4}, {7, 1}, {100, 16}, {1000, 1}}) {
            constexpr int kLoops = 20;
            const int n = work.first, unit = work.second;
            std::vector<std::atomic<int>> dealt(static_cast<size_t>(kLoops * n));
            std::atomic<bool> good{true};
            pool.run([&](Team& team) {
                for (int loop = 0; loop < kLoops; ++loop) {
                    if (team.rank == loop % 4) std::this_thread::sleep_for(std::chrono::microseconds(100));
                    Chunks chunks(team, n, unit);
                    for (Range r = chunks.next(); !r.empty(); r = chunks.next()) {
                        if (r.begin % unit || r.begin < 0 || r.end > n) good = false;
                        for (int i = r.begin; i < r.end; ++i) ++dealt[static_cast<size_t>(loop * n + i)];
                    }
                }
            });
            for (const std::atomic<int>& count : dealt) good = good && count == 1;
            expect(good, "chunks", "threads", threads, n, unit);
        }
    }
}

/// The limits' loops: every byte is read once, and the operations are counted.
void test_machine(const char* isa) {
    const Kernels& kernels = kernels_for(isa);
    for (int streams : {1, 2, 4, 8}) {
        for (int ahead : {0, 2048}) {
            AlignedArray<uint64_t> words(static_cast<size_t>(24 * streams));
            uint64_t expected = 0;
            for (size_t i = 0; i < words.size(); ++i) {
                words[i] = (i + 1) * 0x9e3779b97f4a7c15u;
                expected ^= words[i];
            }
            const auto* bytes = reinterpret_cast<const uint8_t*>(words.data());
            expect(kernels.read_stream(bytes, words.bytes(), streams, ahead) == expected, "read_stream", isa, streams,
                   ahead, 0);
        }
    }
    expect(kernels.integer_peak(3) == 3 * kernels.integer_peak(1), "integer_peak", isa, 3, 0, 0);
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

}  // namespace

int main() {
    test_pool();
    test_chunks();
    test_repack();
    test_rows();
    test_ternary_blocks();
    test_attention();
    test_quantizers();
    for (const std::string& isa : available_isas()) {
        test_integers(isa.c_str());
        test_tiles(isa.c_str());
        test_lines(isa.c_str());
        test_line_linears(isa.c_str());
        test_quantize(isa.c_str());
        test_groups(isa.c_str());
        test_input_grids(isa.c_str());
        test_blocks(isa.c_str());
        test_floats(isa.c_str());
        test_vectors(isa.c_str());
        test_exp(isa.c_str());
        test_machine(isa.c_str());
        test_decoder(isa.c_str());
        test_sparse_decoder(isa.c_str());
        std::printf("%s: done\n", isa.c_str());
    }
    std::printf("%d failures\n", failures);
    return failures;
}

// Codes in tiles and in lines: repacking, rows, products, and the inputs that they are multiplied with.
#include <cstring>
#include <random>

#include "decoder.h"
#include "test_support.h"

using namespace tritkit;

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

/// A matrix of a file whose bytes stay the caller's.
Stored stored(const SourceLayout& layout, const std::vector<uint8_t>& source, int rows, int columns) {
    return {layout, Bytes(nullptr, source.data(), source.size()), rows, columns};
}

namespace {

/// Codes, one by one, as the definitions of the file layouts say.
int source_code(const SourceLayout& layout, const std::vector<uint8_t>& source, int rows, int columns, int r, int k) {
    if (layout.runtime == Runtime::kBinary)
        return source[static_cast<size_t>(r * ((columns + 7) / 8) + k / 8)] >> k % 8 & 1;
    const int packed_rows = (rows + 3) / 4;
    return source[static_cast<size_t>(r % packed_rows * columns + k)] >> 2 * (r / packed_rows) & 3;
}

}  // namespace

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

namespace {

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

}  // namespace

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

namespace {

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

}  // namespace

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

namespace {

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

}  // namespace

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

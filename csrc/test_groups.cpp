// Weights in groups, and inputs on grids: every instruction set against scalar.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "floats.h"
#include "grouped.h"
#include "test_support.h"

using namespace tritkit;

namespace {

/// Random bytes as weights in groups; those that are scales become numbers around one. extreme: the largest codes.
AlignedArray<uint8_t> random_groups(const GroupLayout& g, int tiles, bool extreme) {
    AlignedArray<uint8_t> weights(static_cast<size_t>(tiles * g.tile_bytes()));
    for (size_t i = 0; i < weights.size(); ++i) weights[i] = static_cast<uint8_t>(extreme ? 255 : random_int(0, 255));
    auto put_halves = [](uint8_t* at) {
        for (int r = 0; r < kTileRows; ++r, at += 2) {
            const uint16_t half = static_cast<uint16_t>(random_int(0, 65535) & 0x8fff) | 0x3000;
            std::memcpy(at, &half, 2);
        }
    };
    auto put_floats = [](uint8_t* at) {
        for (int r = 0; r < kTileRows; ++r, at += 4) {
            const float value = random_float();
            std::memcpy(at, &value, 4);
        }
    };
    for (int tile = 0; tile < tiles; ++tile) {
        uint8_t* header = weights.data() + tile * g.tile_bytes();
        for (int begin = 0; begin < g.columns; begin += kSpanColumns) {
            const int end = g.span_end(begin);
            uint8_t* at = header;
            if (g.has_d()) put_halves(at), at += 32;
            if (g.has_dmin()) put_halves(at), at += 32;
            for (int k = begin; k < end; k += kGroupUnit) {
                if (k % g.group) continue;
                if (g.scales == GroupScales::kHalf) put_halves(at);
                if (g.scales == GroupScales::kFloat) put_floats(at);
                at += g.scale_bytes();
                if (g.offsets == GroupOffsets::kHalf) put_halves(at);
                if (g.offsets == GroupOffsets::kFloat) put_floats(at);
                at += g.offset_bytes();
            }
            header += g.header_bytes(begin, end) + (end - begin) / kStripColumns * g.strip_blocks() * kBlockBytes;
        }
    }
    return weights;
}

/// grid: null for a8_g32, or what x is rounded to.
std::vector<float> group_product(const char* isa, const GroupLayout& g, int tiles, int tokens, bool extreme,
                                 const InputGrid* grid = nullptr) {
    random_numbers.seed(static_cast<unsigned>(g.columns * 31 + g.group * 7 + tokens));
    const AlignedArray<uint8_t> weights = random_groups(g, tiles, extreme);
    uint8_t table[32];
    for (uint8_t& byte : table) byte = static_cast<uint8_t>(extreme ? 255 : random_int(0, 255));
    const ptrdiff_t strips = g.columns / kStripColumns;
    AlignedArray<ActivationStrip> codes(static_cast<size_t>(tokens * strips));
    std::vector<float> x(static_cast<size_t>(g.columns)), out(static_cast<size_t>(tokens * tiles * kTileRows));
    for (int t = 0; t < tokens; ++t) {
        for (float& value : x) value = extreme ? (t % 2 ? 2.5f : -2.5f) : random_float();
        if (grid)
            quantize_inputs(*grid, x.data(), g.columns, codes.data() + t * strips);
        else
            kernels_for(isa).quantize_groups(x.data(), g.columns, codes.data() + t * strips);
    }
    const int bias_bits = random_int(-1, 7);
    kernels_for(isa).matmul_groups({weights.data(), g, bias_bits, table, 0, tiles, codes.data(), strips, tokens,
                                    out.data(), tiles * kTileRows, grid && grid->has_lowest()});
    return out;
}

void expect_equal_groups(const char* isa, const GroupLayout& g, int tiles, int tokens, bool extreme,
                         const InputGrid* grid = nullptr) {
    if (!std::strcmp(isa, "scalar")) return;
    const std::vector<float> a = group_product(isa, g, tiles, tokens, extreme, grid),
                             b = group_product("scalar", g, tiles, tokens, extreme, grid);
    const std::string name =
        "groups of " + std::to_string(g.group) + ", codes " + std::to_string(static_cast<int>(g.codes)) + ", scales " +
        std::to_string(static_cast<int>(g.scales)) + ", offsets " + std::to_string(static_cast<int>(g.offsets));
    expect(!std::memcmp(a.data(), b.data(), a.size() * sizeof(float)), name.c_str(), isa, tiles * kTileRows, g.columns,
           tokens);
}

}  // namespace

/// Sums of floats too: their order is the same everywhere, so they are equal bit for bit.
void test_groups(const char* isa) {
    for (int codes = 0; codes < 8; ++codes) {
        for (int scales = 0; scales < 4; ++scales) {
            for (int offsets = 0; offsets < 5; ++offsets) {
                GroupLayout g{static_cast<GroupCodes>(codes), static_cast<GroupScales>(scales),
                              static_cast<GroupOffsets>(offsets), 0, 0};
                if (g.scales == GroupScales::kTwoLevel4 && g.offsets != GroupOffsets::kMins) continue;
                for (int group : {16, 32, 48, 64, 128, 256, 320, 4096}) {
                    g.group = group;
                    g.columns = 32 * random_int(1, 20);
                    expect_equal_groups(isa, g, random_int(1, 9), random_int(1, 9), false);
                }
            }
        }
        for (int tokens = 1; tokens <= 40; ++tokens)
            expect_equal_groups(isa,
                                {static_cast<GroupCodes>(codes), GroupScales::kHalf, GroupOffsets::kNone,
                                 32 * random_int(1, 10), 16 * random_int(1, 4)},
                                random_int(1, 13), tokens, false);
        for (int tokens : {1, 2, 7})
            expect_equal_groups(isa,
                                {static_cast<GroupCodes>(codes), GroupScales::kHalf, GroupOffsets::kZeros, 512, 32}, 3,
                                tokens, true);
    }
    for (int columns : {1, 5, 16, 31, 32, 33, 200}) {
        for (float size : {1e-9f, 1.0f, 1e6f, NAN, INFINITY}) {
            std::vector<float> x(static_cast<size_t>(columns));
            for (float& value : x) value = random_float() * (std::isfinite(size) ? size : 1.0f);
            if (!std::isfinite(size)) x[static_cast<size_t>(columns / 2)] = size;
            AlignedArray<ActivationStrip> a(7), b(7);
            kernels_for(isa).quantize_groups(x.data(), columns, a.data());
            kernels_for("scalar").quantize_groups(x.data(), columns, b.data());
            expect(!std::memcmp(a.data(), b.data(), a.bytes()), "quantize_groups", isa, 1, columns, 1);
        }
    }
}

/// Codes that a8_g32 never has, -128 above all, with weights of every width.
void test_input_grids(const char* isa) {
    const InputGrid grids[] = {
        {-128, 127, 0, false, 0.01f},
        {0, 255, 0, true, 0.01f, 100.0f},
        {0, 255, 0, true},
        {-128, 127, 64},
        {-128, 127},
        {-8, 7},
        {0, 15, 0, true},
        {-128, 127, 0, false, 0, 0, 128.0f},
    };
    for (const InputGrid& grid : grids) {
        grid.require_valid();
        for (int codes = 0; codes < 8; ++codes) {
            for (int group : {16, 32, 128}) {
                const GroupLayout g{static_cast<GroupCodes>(codes), GroupScales::kHalf, GroupOffsets::kZeros,
                                    32 * random_int(1, 20), group};
                expect_equal_groups(isa, g, random_int(1, 5), random_int(1, 9), false, &grid);
            }
            for (int tokens : {1, 2, 7})
                expect_equal_groups(isa,
                                    {static_cast<GroupCodes>(codes), GroupScales::kHalf, GroupOffsets::kNone, 512, 32},
                                    3, tokens, true, &grid);
        }
        for (float odd : {NAN, INFINITY, -INFINITY, 1e-40f}) {
            std::vector<float> x(100);
            for (float& value : x) value = odd * random_float();
            AlignedArray<ActivationStrip> strips(4);
            quantize_inputs(grid, x.data(), 100, strips.data());
            bool good = true;
            for (const ActivationStrip* s = strips.data(); s != strips.data() + 4; ++s)
                for (int8_t code : s->codes)
                    good = good &&
                           (code == 0 || (code + grid.center() >= grid.lo && code + grid.center() <= grid.hi)) &&
                           (grid.has_lowest() || code > -128);
            expect(good, "odd inputs of a grid", isa, 1, 100, 1);
        }
    }
}

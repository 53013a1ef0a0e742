#include "repack.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "kernels.h"

namespace tritkit {
namespace {

constexpr int kTernaryColumns = 16, kBinaryColumns = 32;  // of a block

int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// --- Hugging Face's ternary bytes, uint8 [R, columns] with R = rows / 4, strided along the rows:
//     bits 2i..2i+1 of byte (r, c) hold code + 1 of row i * R + r.

int64_t hf_ternary_bytes(int rows, int columns) { return ceil_div(rows, 4) * columns; }

/// Bits 2i..2i+1 of four bytes at once, moved to bits 0..1 of each.
uint32_t take_field(const uint8_t* bytes, int count, int i) {
    uint32_t word = 0;
    std::memcpy(&word, bytes, count);
    return word >> (2 * i) & 0x03030303u;
}

bool move_hf_ternary(const uint8_t* source, int rows, int columns, int tile, uint8_t* out) {
    const int packed_rows = static_cast<int>(ceil_div(rows, 4));
    uint32_t bad = 0;
    for (int r = 0; r < kTileRows && tile * kTileRows + r < rows; ++r) {
        const int row = tile * kTileRows + r, i = row / packed_rows;
        const uint8_t* from = source + static_cast<ptrdiff_t>(row % packed_rows) * columns;
        for (int k = 0; k < columns; k += kTernaryColumns) {
            uint32_t word = 0;
            for (int field = 0; field < 4 && k + 4 * field < columns; ++field) {
                const int at = k + 4 * field;
                word |= take_field(from + at, std::min(4, columns - at), i) << (2 * field);
            }
            bad |= word & word >> 1 & 0x55555555u;  // code + 1 == 3
            std::memcpy(out + k / kTernaryColumns * kBlockBytes + 4 * r, &word, 4);
        }
    }
    return bad == 0;
}

// --- Signs along the rows, uint8 [rows, columns / 8]: bit j of byte (r, b) is set if code (r, 8b + j) is +1.

int64_t binary_rows_bytes(int rows, int columns) { return rows * ceil_div(columns, 8); }

/// Bits 0, 4, 8 ... 28 of a word, moved together.
uint32_t every_fourth_bit(uint32_t word) {
    word &= 0x11111111u;
    word = (word | word >> 3) & 0x03030303u;
    word = (word | word >> 6) & 0x000f000fu;
    return (word | word >> 12) & 0xffu;
}

bool move_binary_rows(const uint8_t* source, int rows, int columns, int tile, uint8_t* out) {
    const int row_bytes = static_cast<int>(ceil_div(columns, 8));
    for (int r = 0; r < kTileRows && tile * kTileRows + r < rows; ++r) {
        const uint8_t* from = source + static_cast<ptrdiff_t>(tile * kTileRows + r) * row_bytes;
        for (int at = 0; at < row_bytes; at += 4) {
            uint32_t signs = 0;  // bit k: column 8 * at + k
            for (int i = 0; i < 4 && at + i < row_bytes; ++i) signs |= static_cast<uint32_t>(from[at + i]) << (8 * i);
            uint8_t* to = out + at / 4 * kBlockBytes + 4 * r;
            for (int j = 0; j < 4; ++j) to[j] = static_cast<uint8_t>(every_fourth_bit(signs >> j));
        }
    }
    return true;
}

// --- Floats [rows, columns], kept as they are but for the padding of each row.

template <int bytes>
int64_t float_bytes(int rows, int columns) {
    return static_cast<int64_t>(rows) * columns * bytes;
}

template <int bytes>
bool move_floats(const uint8_t* source, int rows, int columns, int tile, uint8_t* out) {
    const ptrdiff_t from_stride = static_cast<ptrdiff_t>(columns) * bytes,
                    to_stride = round_up(columns, kFloatPad) * bytes;
    for (int r = 0; r < kTileRows && tile * kTileRows + r < rows; ++r)
        std::memcpy(out + r * to_stride, source + (tile * kTileRows + r) * from_stride, from_stride);
    return true;
}

// A new layout of a file is one function and one row here.
const SourceLayout kSources[] = {
    {"hf_autobitlinear", Runtime::kTernary, hf_ternary_bytes, move_hf_ternary},
    {"hf_bitlinear", Runtime::kTernary, hf_ternary_bytes, move_hf_ternary},
    {"binary_rows", Runtime::kBinary, binary_rows_bytes, move_binary_rows},
    {"f32", Runtime::kF32, float_bytes<4>, move_floats<4>},
    {"f16", Runtime::kF16, float_bytes<2>, move_floats<2>},
    {"bf16", Runtime::kBf16, float_bytes<2>, move_floats<2>},
};

}  // namespace

const SourceLayout& source_layout(const std::string& name) {
    std::string known;
    for (const SourceLayout& row : kSources) {
        if (row.name == name) return row;
        known += (known.empty() ? "" : ", ") + std::string(row.name);
    }
    throw std::invalid_argument("layout is '" + name + "', expected one of " + known);
}

int64_t tile_bytes(Runtime layout, int columns) {
    switch (layout) {
        case Runtime::kTernary:
            return ceil_div(columns, kTernaryColumns) * kBlockBytes;
        case Runtime::kBinary:
            return ceil_div(columns, kBinaryColumns) * kBlockBytes;
        case Runtime::kF32:
            return kTileRows * round_up(columns, kFloatPad) * 4;
        default:
            return kTileRows * round_up(columns, kFloatPad) * 2;
    }
}

AlignedArray<uint8_t> repack(const SourceLayout& layout, const void* source, int rows, int columns, Pool& pool) {
    const int tiles = static_cast<int>(ceil_div(rows, kTileRows));
    const int64_t bytes = tile_bytes(layout.runtime, columns);
    AlignedArray<uint8_t> out(static_cast<size_t>(tiles * bytes), false);
    std::atomic<bool> good{true};
    pool.run([&](Team& team) {
        const Range mine = team.share(tiles);
        for (int tile = mine.begin; tile < mine.end; ++tile) {
            uint8_t* to = out.data() + tile * bytes;
            std::memset(to, 0, static_cast<size_t>(bytes));
            if (!layout.move_tile(static_cast<const uint8_t*>(source), rows, columns, tile, to)) good = false;
        }
    });
    if (!good) throw std::invalid_argument(std::string(layout.name) + " data holds a code that is not -1, 0 or +1");
    return out;
}

}  // namespace tritkit

#include "repack.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "floats.h"
#include "kernels.h"

namespace tritkit {
namespace {

constexpr int kGroupColumns = 4;  // columns of a group of codes

constexpr int64_t kSliceBytes = int64_t{16}
                                << 20;  // of a mapped source, between one dropping of its pages and the next

int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

int one_tile(int) { return 1; }

/// Four codes of row `row` of a tile.
void put(uint8_t* codes, int group, int row, uint32_t word) {
    std::memcpy(codes + group * kBlockBytes + 4 * row, &word, sizeof word);
}

// --- Hugging Face's ternary bytes, uint8 [R, columns] with R = rows / 4, strided along the rows:
//     bits 2i..2i+1 of byte (r, c) hold code + 1 of row i * R + r.

/// Where R is whole tiles, 16 rows of bytes are four tiles of weights.
int hf_ternary_together(int rows) { return rows % (4 * kTileRows) == 0 ? 4 : 1; }

/// The bytes of a part in the order of codes, word r of group g from the row that code r comes from, moved down to the
/// field of that row. Beyond the last column: weights of 0.
void gather_hf_words(const SourcePart& p, uint32_t* words) {
    const int packed_rows = static_cast<int>(ceil_div(p.rows, 4));
    const int columns = std::min(p.count, p.columns - p.begin);
    for (int r = 0; r < kTileRows && p.tile * kTileRows + r < p.rows; ++r) {
        const int row = p.tile * kTileRows + r, shift = 2 * (row / packed_rows);
        const uint8_t* from = p.source + static_cast<ptrdiff_t>(row % packed_rows) * p.columns + p.begin;
        uint32_t* to = words + r;
        uint32_t word;
        for (int k = 0; k + kGroupColumns <= columns; k += kGroupColumns, to += kTileRows) {
            std::memcpy(&word, from + k, sizeof word);
            *to = word >> shift;
        }
        if (const int rest = columns % kGroupColumns) {
            word = 0x55555555u;
            std::memcpy(&word, from + columns - rest, static_cast<size_t>(rest));
            *to = word >> shift;
        }
    }
}

bool unpack_hf_ternary(const SourcePart& p, uint8_t* codes) {
    alignas(64) uint32_t words[panel_columns(1) / kGroupColumns * kTileRows];
    const int count = static_cast<int>(ceil_div(p.count, kGroupColumns)) * kTileRows;
    const int tiles = hf_ternary_together(p.rows);
    // Rows that do not exist are weights of 0.
    if ((p.tile + 1) * kTileRows > p.rows || p.begin + p.count > p.columns)
        std::fill(words, words + count, 0x55555555u);
    gather_hf_words(p, words);
    uint32_t bad = 0;
    for (int i = 0; i < tiles; ++i) {
        auto* to = reinterpret_cast<uint32_t*>(codes + i * p.spacing);
        for (int w = 0; w < count; ++w) {
            const uint32_t word = words[w] >> (2 * i) & 0x03030303u;
            bad |= word & word >> 1;  // code + 1 == 3
            to[w] = word;
        }
    }
    return (bad & 0x01010101u) == 0;
}

// --- Signs along the rows, uint8 [rows, columns / 8]: bit j of byte (r, b) is set if code (r, 8b + j) is +1.

/// Bit j of four, moved to bit 0 of byte j.
uint32_t spread_bits(uint32_t bits) { return (bits & 15) * 0x00204081u & 0x01010101u; }

bool unpack_binary_rows(const SourcePart& p, uint8_t* codes) {
    const ptrdiff_t row_bytes = ceil_div(p.columns, 8);
    const int columns = std::min(p.count, p.columns - p.begin);
    for (int r = 0; r < kTileRows && p.tile * kTileRows + r < p.rows; ++r) {
        const uint8_t* from = p.source + (p.tile * kTileRows + r) * row_bytes + p.begin / 8;
        for (int k = 0; k < columns; k += kGroupColumns)
            put(codes, k / kGroupColumns, r, spread_bits(from[k / 8] >> k % 8));
    }
    return true;
}

// --- Blocks of ternary codes, uint8 [rows, blocks of a row] (ggml_blocks.h), all with the scale of the matrix or,
// where
//     nothing but zeros is in them, with none.

bool unpack_ternary_blocks(const SourcePart& p, uint8_t* codes) {
    const BlockType& type = *p.layout.blocks;
    const int columns = std::min(p.count, p.columns - p.begin);
    bool good = true;
    unsigned bad = 0;
    Block block{};
    for (int r = 0; r < kTileRows && p.tile * kTileRows + r < p.rows; ++r) {
        const int64_t row = p.tile * kTileRows + r, first = (row * p.columns + p.begin) / type.columns;
        const uint8_t* from = p.source + first * type.bytes;
        for (int k = 0; k < columns; k += type.columns, from += type.bytes) {
            type.unpack(from, block);
            if (type.has_scale && block.d != p.scale) {
                good = good && (block.d & 0x7fff) == 0;
                std::memset(block.codes, 1, sizeof block.codes);
            }
            for (int i = 0; i < type.columns; i += kGroupColumns) {
                uint32_t word;
                std::memcpy(&word, block.codes + i, sizeof word);
                bad |= word & word >> 1;  // code + 1 == 3
                put(codes, (k + i) / kGroupColumns, r, word);
            }
        }
    }
    return good && (bad & 0x01010101u) == 0;
}

constexpr char kNotTernary[] = "a code that is not -1, 0 or +1";
constexpr char kNotOneScale[] = "a code that is not -1, 0 or +1, or a block with another scale than the matrix";

/// A new layout of a file is a function and a row here, or a row in ggml_blocks.cpp.
std::vector<SourceLayout> all_sources() {
    std::vector<SourceLayout> sources = {
        {"hf_autobitlinear", Runtime::kTernary, 1, 1, 4, false, hf_ternary_together, unpack_hf_ternary, kNotTernary,
         nullptr},
        {"hf_bitlinear", Runtime::kTernary, 1, 1, 4, false, hf_ternary_together, unpack_hf_ternary, kNotTernary,
         nullptr},
        {"binary_rows", Runtime::kBinary, 1, 8, 1, true, one_tile, unpack_binary_rows, "", nullptr},
        {"f32", Runtime::kF32, 4, 1, 1, false, one_tile, nullptr, "", nullptr},
        {"f16", Runtime::kF16, 2, 1, 1, false, one_tile, nullptr, "", nullptr},
        {"bf16", Runtime::kBf16, 2, 1, 1, false, one_tile, nullptr, "", nullptr},
    };
    for (const BlockType& type : block_types())
        sources.push_back({type.name, type.ternary() ? Runtime::kTernary : Runtime::kGroups, type.bytes, type.columns,
                           1, false, one_tile, type.ternary() ? unpack_ternary_blocks : nullptr,
                           type.has_scale ? kNotOneScale : kNotTernary, &type});
    return sources;
}

// --- Run-time layouts: each block from the groups of its columns.

/// bits / group: of each code, from the lowest bit of a byte up.
template <int bits>
void pack_fields(const uint8_t* codes, int blocks, uint8_t* out) {
    constexpr int kFields = 8 / bits;
    for (int b = 0; b < blocks; ++b, codes += kFields * kBlockBytes, out += kBlockBytes) {
        for (int i = 0; i < kBlockBytes; ++i) {
            unsigned byte = codes[i];
            for (int f = 1; f < kFields; ++f) byte |= static_cast<unsigned>(codes[f * kBlockBytes + i]) << (bits * f);
            out[i] = static_cast<uint8_t>(byte);
        }
    }
}

/// Five trits t_0 ... t_4 are v = sum of t_f 3^(4-f) <= 242; the byte ceil(v * 256 / 243) keeps them as a fraction.
void pack_base3(const uint8_t* codes, int blocks, uint8_t* out) {
    for (int b = 0; b < blocks; ++b, codes += 5 * kBlockBytes, out += kBlockBytes) {
        for (int i = 0; i < kBlockBytes; ++i) {
            uint16_t v = codes[i];
            for (int f = 1; f < 5; ++f) v = static_cast<uint16_t>(3 * v + codes[f * kBlockBytes + i]);
            // v + ceil(v * 13 / 243), in 16 bits; true for every v up to 242
            const uint16_t high = static_cast<uint16_t>(static_cast<uint32_t>(v << 8) * 3506 >> 16);
            out[i] = static_cast<uint8_t>(v + ((high + 255) >> 8));
        }
    }
}

struct RuntimeLayout {
    Runtime runtime;
    Runtime codes;  // the kind of codes it holds, named by the layout that fits every machine
    TileLayout tile;
    uint8_t zero;  // a code of no weight
    void (*pack)(const uint8_t* codes, int blocks, uint8_t* out);
};

// A new run-time layout is one function and one row here.
const RuntimeLayout kRuntimes[] = {
    {Runtime::kTernary, Runtime::kTernary, TileLayout::kT16_2, 1, pack_fields<2>},
    {Runtime::kTernary3, Runtime::kTernary, TileLayout::kT16_3, 1, pack_base3},
    {Runtime::kBinary, Runtime::kBinary, TileLayout::kT16_1, 0, pack_fields<1>},
    {Runtime::kInt4, Runtime::kInt4, TileLayout::kT16_4, 8, pack_fields<4>},
    {Runtime::kInt8, Runtime::kInt8, TileLayout::kT16_8, 128, pack_fields<8>},
};

const RuntimeLayout& runtime_layout(Runtime runtime) {
    for (const RuntimeLayout& row : kRuntimes)
        if (row.runtime == runtime) return row;
    throw std::invalid_argument("the layout is none of codes with one scale for a matrix or a row");
}

void copy_rows(Runtime runtime, const uint8_t* source, int rows, int columns, int tile, uint8_t* out) {
    const ptrdiff_t from = static_cast<ptrdiff_t>(columns) * float_bytes(runtime),
                    to = round_up(columns, kFloatPad) * float_bytes(runtime);
    for (int r = 0; r < kTileRows; ++r, out += to) {
        const int row = tile * kTileRows + r;
        const ptrdiff_t filled = row < rows ? from : 0;
        if (filled) std::memcpy(out, source + row * from, static_cast<size_t>(filled));
        std::memset(out + filled, 0, static_cast<size_t>(to - filled));
    }
}

/// All tiles that share their bytes with `tile`, panel by panel. `codes` has room for a panel of each.
bool move_tiles(const SourceLayout& from, const RuntimeLayout& to, SourcePart part, int tiles, uint8_t* codes,
                uint8_t* out) {
    const int together = from.tiles_together(part.rows), panel = panel_columns(together);
    const int64_t bytes = tile_bytes(to.runtime, part.columns);
    bool good = true;
    for (part.begin = 0; part.begin < part.columns; part.begin += panel) {
        const int block_columns = facts(to.tile).columns;
        const int blocks = blocks_of(to.tile, std::min(panel, part.columns - part.begin));
        part.count = blocks * block_columns;
        part.spacing = static_cast<ptrdiff_t>(panel) * kTileRows;
        const bool whole = part.begin + part.count <= part.columns && (part.tile + 1) * kTileRows <= part.rows;
        if (!whole) std::memset(codes, to.zero, static_cast<size_t>(together * part.spacing));
        good = from.unpack(part, codes) && good;
        for (int i = 0; i < together; ++i) {
            const int tile = part.tile + i * (tiles / together);
            to.pack(codes + i * part.spacing, blocks,
                    out + tile * bytes + static_cast<int64_t>(part.begin / block_columns) * kBlockBytes);
        }
    }
    return good;
}

}  // namespace

const SourceLayout& source_layout(const std::string& name) {
    static const std::vector<SourceLayout> sources = all_sources();
    std::string known;
    for (const SourceLayout& row : sources) {
        if (row.name == name) return row;
        known += (known.empty() ? "" : ", ") + std::string(row.name);
    }
    throw std::invalid_argument("layout is '" + name + "', expected one of " + known);
}

int64_t SourceLayout::source_bytes(int rows, int columns) const {
    return ceil_div(rows, block_rows) * ceil_div(columns, block_columns) * block_bytes;
}

void pack_codes(TileLayout layout, const uint8_t* codes, int blocks, uint8_t* out) {
    for (const RuntimeLayout& row : kRuntimes)
        if (row.tile == layout) row.pack(codes, blocks, out);
}

TileLayout tile_layout(Runtime layout) { return runtime_layout(layout).tile; }

int64_t tile_bytes(Runtime layout, int columns) {
    if (is_float(layout)) return kTileRows * round_up(columns, kFloatPad) * float_bytes(layout);
    return static_cast<int64_t>(blocks_of(tile_layout(layout), columns)) * kBlockBytes;
}

bool runs_in_place(const SourceLayout& layout, const void* data, int columns) {
    return is_float(layout.runtime) && columns % kFloatPad == 0 &&
           reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(float_bytes(layout.runtime)) == 0;
}

// Where it is mapped, pages are dropped behind the work.
void move_all(const Stored& source, int items, Pool& pool, const std::function<void(int rank, int item)>& move) {
    const int64_t total = static_cast<int64_t>(source.bytes.size());
    const int slices = source.mapped ? static_cast<int>(ceil_div(total, kSliceBytes)) : 1;
    for (int slice = 0; slice < slices; ++slice) {
        const int first = static_cast<int>(static_cast<int64_t>(items) * slice / slices),
                  end = static_cast<int>(static_cast<int64_t>(items) * (slice + 1) / slices);
        pool.run([&](Team& team) {
            Chunks chunks(team, end - first, 1);
            for (Range r = chunks.next(); !r.empty(); r = chunks.next())
                for (int item = first + r.begin; item < first + r.end; ++item) move(team.rank, item);
        });
        // The items of a slice come from about this part of the source; where they do not, pages are read twice.
        const int64_t begin = total * slice / slices, size = total * (slice + 1) / slices - begin;
        if (source.mapped) drop_file_pages(source.bytes.data() + begin, static_cast<size_t>(size));
    }
    if (source.mapped) drop_file_pages(source.bytes.data(), source.bytes.size());
}

Bytes repack(const Stored& source, Runtime runtime, float scale, Pool& pool, Arena& arena) {
    const SourceLayout& layout = source.layout;
    const uint8_t* bytes = source.bytes.data();
    const int rows = source.rows, columns = source.columns;
    if (is_float(runtime) ? runtime != layout.runtime : runtime_layout(runtime).codes != layout.runtime)
        throw std::invalid_argument(std::string(layout.name) + " data does not go into this run-time layout");
    const int tiles = static_cast<int>(ceil_div(rows, kTileRows)), groups = tiles / layout.tiles_together(rows);
    const int64_t tile_size = tile_bytes(runtime, columns);
    uint8_t* to;
    Bytes out = arena.allocate(static_cast<size_t>(tiles * tile_size), to);
    const size_t panel = static_cast<size_t>(panel_columns(1) * kTileRows);
    AlignedArray<uint8_t> panels(is_float(runtime) ? 0 : panel * static_cast<size_t>(pool.size()), false);
    std::atomic<bool> good{true};
    move_all(source, groups, pool, [&](int rank, int group) {
        const SourcePart part{layout, bytes, rows, columns, f16_from_float(scale), group, 0, 0, 0};
        if (is_float(runtime))
            copy_rows(runtime, bytes, rows, columns, group, to + group * tile_size);
        else if (!move_tiles(layout, runtime_layout(runtime), part, tiles,
                             panels.data() + panel * static_cast<size_t>(rank), to))
            good = false;
    });
    if (!good) throw std::invalid_argument(std::string(layout.name) + " data holds " + layout.fault);
    return out;
}

}  // namespace tritkit

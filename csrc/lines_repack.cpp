// From the bytes of a file to L64-3 lines (line_table.h). A tile of codes, 16 rows by 320 columns, is one line of each
// of 16 rows, or a quarter of one field of a line of each of 320 columns.
#include <algorithm>
#include <array>
#include <atomic>
#include <stdexcept>

#include "floats.h"
#include "lines.h"

namespace tritkit {
namespace {

constexpr uint32_t kPlaces[] = {81, 27, 9, 3, 1};       // of a field's trit in v
constexpr int kWordsOfField = kBlockBytes / 4;          // of four entries
constexpr int kTilesOfLine = kLineEntries / kTileRows;  // of rows, where columns lie in lines

/// Five trits as v = sum of t_f 3^(4-f) become the fraction ceil(v * 256 / 243), as in T16-3.
void to_fractions(uint8_t* v, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; ++i) {
        const uint16_t high = static_cast<uint16_t>(static_cast<uint32_t>(v[i] << 8) * 3506 >> 16);
        v[i] = static_cast<uint8_t>(v[i] + ((high + 255) >> 8));
    }
}

uint32_t word_at(const uint8_t* bytes) {
    uint32_t word;
    std::memcpy(&word, bytes, sizeof word);
    return word;
}

/// Some lines of each row of a tile, `stride` apart.
void pack_row_lines(const uint8_t* codes, int rows, int lines, ptrdiff_t stride, uint8_t* out) {
    for (int r = 0; r < rows; ++r, out += stride) {
        for (int w = 0; w < lines * kWordsOfField; ++w) {
            const int first = w / kWordsOfField * kLineFields * kWordsOfField + w % kWordsOfField;
            uint32_t v = 0;
            for (int f = 0; f < kLineFields; ++f)
                v += kPlaces[f] * word_at(codes + (first + f * kWordsOfField) * kBlockBytes + 4 * r);
            std::memcpy(out + 4 * w, &v, sizeof v);
        }
        to_fractions(out, lines * kBlockBytes);
    }
}

/// Four words of bytes (k, c), turned into words of bytes (c, k).
std::array<uint32_t, 4> transposed(const uint8_t* words) {
    const uint32_t a = word_at(words), b = word_at(words + 4), c = word_at(words + 8), d = word_at(words + 12);
    const uint32_t low = 0x00ff00ffu, high = 0xff00ff00u;
    const uint32_t ab0 = (a & low) | (b & low) << 8, ab1 = (a & high) >> 8 | (b & high);
    const uint32_t cd0 = (c & low) | (d & low) << 8, cd1 = (c & high) >> 8 | (d & high);
    return {(ab0 & 0xffff) | cd0 << 16, (ab1 & 0xffff) | cd1 << 16, ab0 >> 16 | (cd0 & 0xffff0000u),
            ab1 >> 16 | (cd1 & 0xffff0000u)};
}

/// Adds the trits of a tile to the v of some columns, `stride` apart.
void add_to_columns(const uint8_t* codes, int tile, int columns, ptrdiff_t stride, uint8_t* out) {
    const int in_line = tile % kTilesOfLine;
    const uint32_t place = kPlaces[in_line / 4];
    out += tile / kTilesOfLine * kBlockBytes + column_byte(in_line % 4 * kTileRows);
    for (int k = 0; k < columns; k += 4, codes += kBlockBytes)
        for (int r = 0; r < kTileRows; r += 4) {
            const std::array<uint32_t, 4> of_column = transposed(codes + 4 * r);
            for (int c = 0; c < 4 && k + c < columns; ++c) {
                uint8_t* to = out + (k + c) * stride + column_byte(r);
                const uint32_t v = word_at(to) + place * of_column[static_cast<size_t>(c)];
                std::memcpy(to, &v, sizeof v);
            }
        }
}

}  // namespace

Bytes repack_lines(const Stored& source, bool by_columns, float scale, Pool& pool, Arena& arena) {
    if (source.layout.runtime != Runtime::kTernary)
        throw std::invalid_argument(std::string(source.layout.name) + " data does not go into lines");
    const SourceLayout& layout = source.layout;
    const int together = layout.tiles_together(source.rows), rows = source.rows, columns = source.columns;
    const int groups = (rows + kTileRows - 1) / kTileRows / together;
    const int panel = panel_columns(together), panels = (columns + panel - 1) / panel;  // whole lines
    const ptrdiff_t stride = ptrdiff_t{lines_of(by_columns ? rows : columns)} * kBlockBytes;
    uint8_t* out;
    Bytes lines = arena.allocate(static_cast<size_t>((by_columns ? columns : rows) * stride), out);
    const ptrdiff_t tile_codes = ptrdiff_t{panel} * kTileRows, room = together * tile_codes;
    AlignedArray<uint8_t> scratch(static_cast<size_t>(room * pool.size()), false);
    std::atomic<bool> good{true};
    auto move = [&](int group, int begin, uint8_t* codes) {
        const int count = std::min(panel, columns - begin);
        if (count < panel || (group + 1) * kTileRows > rows) std::memset(codes, 1, static_cast<size_t>(room));
        const SourcePart part{layout, source.bytes.data(), rows, columns, f16_from_float(scale), group, begin,
                              panel,  tile_codes};
        if (!layout.unpack(part, codes)) good = false;
        for (int i = 0; i < together; ++i, codes += tile_codes) {
            const int tile = group + i * groups, row = tile * kTileRows;
            if (by_columns)
                add_to_columns(codes, tile, count, stride, out + begin * stride);
            else
                pack_row_lines(codes, std::min(kTileRows, rows - row), lines_of(count), stride,
                               out + row * stride + begin / kLineEntries * kBlockBytes);
        }
    };
    // Tiles share the bytes of a column, so a thread has columns of its own.
    move_all(source, by_columns ? panels : groups, pool, [&](int rank, int item) {
        uint8_t* codes = scratch.data() + rank * room;
        for (int i = 0; i < (by_columns ? groups : panels); ++i)
            by_columns ? move(i, item * panel, codes) : move(item, i * panel, codes);
        if (by_columns) to_fractions(out + item * panel * stride, std::min(panel, columns - item * panel) * stride);
    });
    if (!good) throw std::invalid_argument(std::string(layout.name) + " data holds " + layout.fault);
    return lines;
}

}  // namespace tritkit

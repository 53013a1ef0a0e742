#include "group_sources.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace tritkit {
namespace {

constexpr int kTableSize = 16;

int ceil_div(int n, int d) { return (n + d - 1) / d; }

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

GroupCodes codes_of(const GroupArrays& s) {
    if (s.table) {
        const bool bytes = std::all_of(s.table, s.table + kTableSize, [](int v) { return v >= -128 && v <= 127; });
        return bytes ? GroupCodes::kTable8 : GroupCodes::kTable16;
    }
    constexpr GroupCodes kOfBits[] = {GroupCodes::k2, GroupCodes::k3, GroupCodes::k4, GroupCodes::k5,
                                      GroupCodes::k6, GroupCodes::k8, GroupCodes::k8};
    return kOfBits[s.bits - 2];
}

/// Whether scales and mins fit one byte together.
bool fit_nibbles(const GroupArrays& s) {
    if (s.scale_form != GroupScales::kTwoLevel || s.offset_form != GroupOffsets::kMins) return false;
    const size_t count = static_cast<size_t>(s.rows) * static_cast<size_t>(ceil_div(s.columns, s.group));
    const auto fits = [&](const void* values) {
        const auto* bytes = static_cast<const uint8_t*>(values);
        return std::all_of(bytes, bytes + count, [](uint8_t v) { return v < 16; });
    };
    return fits(s.scales) && fits(s.offsets);
}

/// The layout of arrays, checked.
GroupLayout layout_of(const GroupArrays& s) {
    if (s.bits < 2 || s.bits > 8) refuse("bits is " + std::to_string(s.bits) + ", expected 2 to 8");
    if (s.table && (s.bits != 4 || s.offset_form != GroupOffsets::kNone))
        refuse("a table has 16 numbers, for codes of 4 bits without offsets");
    if (s.group < 1 || (s.group < s.columns && s.group % kGroupUnit))
        refuse("the group size is " + std::to_string(s.group) + ", expected a multiple of " +
               std::to_string(kGroupUnit) + ", or at least the " + std::to_string(s.columns) + " columns");
    GroupLayout layout{codes_of(s), s.scale_form, s.offset_form, static_cast<int>(round_up(s.columns, kStripColumns)),
                       s.group};
    if (s.group >= s.columns) layout.group = layout.columns;
    if ((layout.has_d() || layout.has_dmin()) && (s.group > kSpanColumns || kSpanColumns % s.group))
        refuse("the group size is " + std::to_string(s.group) + ", expected a divisor of " +
               std::to_string(kSpanColumns) + " where scales have two levels");
    if (fit_nibbles(s)) layout.scales = GroupScales::kTwoLevel4;
    return layout;
}

int bias_bits_of(const GroupArrays& s) { return s.table ? 7 : s.offset_form == GroupOffsets::kNone ? s.bits - 1 : -1; }

/// Entry `column` of the rows of a tile, [rows, columns] elements of so many bytes, one behind the other.
uint8_t* gather_column(const void* values, int element, const GroupArrays& s, int columns, int tile, int column,
                       uint8_t* out) {
    const int rows = std::min(kTileRows, s.rows - tile * kTileRows);
    for (int r = 0; r < rows; ++r) {
        const ptrdiff_t at = static_cast<ptrdiff_t>(tile * kTileRows + r) * columns + column;
        std::memcpy(out + r * element, static_cast<const uint8_t*>(values) + at * element,
                    static_cast<size_t>(element));
    }
    return out + kTileRows * element;
}

}  // namespace

void read_fields(const uint8_t* bytes, ptrdiff_t end, int bits, int begin, int count, uint8_t* out) {
    if (bits == 8) {
        std::memcpy(out, bytes + begin, static_cast<size_t>(count));
        return;
    }
    ptrdiff_t bit = ptrdiff_t{begin} * bits;
    for (int k = 0; k < count; ++k, bit += bits) {
        const ptrdiff_t at = bit / 8;
        const unsigned two = bytes[at] | (at + 1 < end ? bytes[at + 1] << 8 : 0u);
        out[k] = static_cast<uint8_t>(two >> bit % 8 & ((1u << bits) - 1));
    }
}

void GroupSource::for_each_tile(Pool& pool, int tiles, const std::function<void(int tile)>& move) const {
    pool.run([&](Team& team) {
        const Range mine = team.share(tiles);
        for (int tile = mine.begin; tile < mine.end; ++tile) move(tile);
    });
}

ArraySource::ArraySource(const GroupArrays& arrays)
    : GroupSource(arrays.rows, arrays.columns, layout_of(arrays), bias_bits_of(arrays)), s_(arrays) {}

std::string ArraySource::fault() const {
    return "there is a code that does not fit " + std::to_string(s_.bits) + " bits";
}

void ArraySource::copy_table(uint8_t (&table)[32]) const {
    for (int i = 0; s_.table && i < kTableSize; ++i) {
        const bool bytes = layout_.codes == GroupCodes::kTable8;
        const unsigned number = static_cast<unsigned>(s_.table[i] + (bytes ? 128 : 128 * 256));
        table[i] = static_cast<uint8_t>(bytes ? number : number >> 8);
        table[kTableSize + i] = static_cast<uint8_t>(number);
    }
}

bool ArraySource::read_span(int tile, int begin, int end, uint8_t* header, SpanCodes& codes) const {
    read_header(tile, begin, end, header);
    const int columns = std::min(end, s_.columns) - begin, rows = std::min(kTileRows, s_.rows - tile * kTileRows);
    unsigned all = 0;
    uint8_t from[kSpanColumns];
    for (int r = 0; r < rows; ++r) {
        read_fields(s_.codes + (tile * kTileRows + r) * s_.row_bytes(), s_.row_bytes(), s_.field_bits, begin, columns,
                    from);
        for (int k = 0; k < columns; ++k) {
            codes.quads[k / 4][4 * r + k % 4] = from[k];
            all |= from[k];
        }
    }
    return all >> s_.bits == 0;
}

void ArraySource::read_header(int tile, int begin, int end, uint8_t* out) const {
    const GroupLayout& g = layout_;
    const int spans = ceil_div(s_.columns, kSpanColumns), groups = ceil_div(s_.columns, s_.group);
    if (g.has_d()) out = gather_column(s_.d, 2, s_, spans, tile, begin / kSpanColumns, out);
    if (g.has_dmin()) out = gather_column(s_.dmin, 2, s_, spans, tile, begin / kSpanColumns, out);
    for (int group = ceil_div(begin, g.group); group < groups && group * g.group < end; ++group) {
        uint8_t* const scales = out;
        out = gather_column(s_.scales, g.scale_bytes() / kTileRows, s_, groups, tile, group, out);
        if (g.scales == GroupScales::kTwoLevel4) {
            uint8_t mins[kTileRows] = {};
            gather_column(s_.offsets, 1, s_, groups, tile, group, mins);
            for (int r = 0; r < kTileRows; ++r) scales[r] = static_cast<uint8_t>(scales[r] | mins[r] << 4);
        } else if (g.offset_bytes()) {
            out = gather_column(s_.offsets, g.offset_bytes() / kTileRows, s_, groups, tile, group, out);
        }
    }
}

BlockSource::BlockSource(const Stored& stored)
    : GroupSource(stored.rows, stored.columns, group_layout(*stored.layout.blocks, stored.columns),
                  stored.layout.blocks->bias_bits),
      stored_(stored),
      type_(*stored.layout.blocks) {}

std::string BlockSource::fault() const {
    return std::string(type_.name) + " data holds a scale that is not a finite number";
}

void BlockSource::for_each_tile(Pool& pool, int tiles, const std::function<void(int tile)>& move) const {
    move_all(stored_, tiles, pool, [&](int, int tile) { move(tile); });
}

bool BlockSource::read_span(int tile, int begin, int end, uint8_t* header, SpanCodes& codes) const {
    const GroupLayout& g = layout_;
    const int rows = std::min(kTileRows, rows_ - tile * kTileRows), last = std::min(end, columns_);
    const int offset_at = g.scales == GroupScales::kTwoLevel4 ? 0 : g.scale_bytes();
    bool good = true;
    Block block{};
    for (int r = 0; r < rows; ++r) {
        const int64_t row_blocks = columns_ / type_.columns, row = tile * kTileRows + r;
        const uint8_t* from = stored_.bytes.data() + (row * row_blocks + begin / type_.columns) * type_.bytes;
        uint8_t* scales = header + 32 * g.has_d() + 32 * g.has_dmin();
        for (int k = begin; k < last; k += type_.columns, from += type_.bytes) {
            type_.unpack(from, block);
            good = is_finite(type_, block) && good;
            if (g.has_d()) std::memcpy(header + 2 * r, &block.d, 2);
            if (g.has_dmin()) std::memcpy(header + 32 + 2 * r, &block.m, 2);
            for (int i = 0; i < type_.columns / g.group; ++i, scales += g.scale_bytes() + g.offset_bytes()) {
                if (g.scales == GroupScales::kHalf) std::memcpy(scales + 2 * r, &block.d, 2);
                if (g.offsets == GroupOffsets::kHalf) std::memcpy(scales + offset_at + 2 * r, &block.m, 2);
                if (g.scales == GroupScales::kTwoLevel) scales[r] = block.scales[i];
                if (g.scales == GroupScales::kTwoLevel4)
                    scales[r] = static_cast<uint8_t>(block.scales[i] | block.mins[i] << 4);
                else if (g.offsets == GroupOffsets::kMins)
                    scales[offset_at + r] = block.mins[i];
            }
            for (int i = 0; i < type_.columns; i += 4)
                std::memcpy(codes.quads[(k - begin + i) / 4] + 4 * r, block.codes + i, 4);
        }
    }
    return good;
}

}  // namespace tritkit

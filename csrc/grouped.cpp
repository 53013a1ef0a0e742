#include "grouped.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

namespace tritkit {
namespace {

constexpr int kStripQuads = kStripColumns / 4;
constexpr int kTableSize = 16;

int ceil_div(int n, int d) { return (n + d - 1) / d; }

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

GroupCodes codes_of(const GroupedSource& s) {
    if (s.table) {
        const bool bytes = std::all_of(s.table, s.table + kTableSize, [](int v) { return v >= -128 && v <= 127; });
        return bytes ? GroupCodes::kTable8 : GroupCodes::kTable16;
    }
    constexpr GroupCodes kOfBits[] = {GroupCodes::k2, GroupCodes::k3, GroupCodes::k4, GroupCodes::k5,
                                      GroupCodes::k6, GroupCodes::k8, GroupCodes::k8};
    return kOfBits[s.bits - 2];
}

/// The layout of a source, checked.
GroupLayout layout_of(const GroupedSource& s) {
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
    return layout;
}

/// Whether scales and mins fit one byte together.
bool fit_nibbles(const GroupedSource& s) {
    if (s.scale_form != GroupScales::kTwoLevel || s.offset_form != GroupOffsets::kMins) return false;
    const size_t count = static_cast<size_t>(s.rows) * static_cast<size_t>(ceil_div(s.columns, s.group));
    const auto fits = [&](const void* values) {
        const auto* bytes = static_cast<const uint8_t*>(values);
        return std::all_of(bytes, bytes + count, [](uint8_t v) { return v < 16; });
    };
    return fits(s.scales) && fits(s.offsets);
}

/// The codes of a strip in the order that all T16 layouts share: byte 4r+j of quad q is row r, column 4q+j. False if
/// a code has too many bits.
bool gather_strip(const GroupedSource& s, int tile, int begin, uint8_t (&quads)[kStripQuads][kBlockBytes]) {
    std::memset(quads, 0, sizeof quads);
    const int columns = std::min(kStripColumns, s.columns - begin),
              rows = std::min(kTileRows, s.rows - tile * kTileRows);
    unsigned all = 0;
    for (int r = 0; r < rows; ++r) {
        const uint8_t* from = s.codes + static_cast<ptrdiff_t>(tile * kTileRows + r) * s.columns + begin;
        for (int k = 0; k < columns; ++k) {
            quads[k / 4][4 * r + k % 4] = from[k];
            all |= from[k];
        }
    }
    return all >> s.bits == 0;
}

/// One plane of a strip: `bits` bits of each code from `shift` on.
uint8_t* pack_plane(const uint8_t (&quads)[kStripQuads][kBlockBytes], int bits, int shift, uint8_t* out) {
    const int fields = 8 / bits;
    for (int q = 0; q < kStripQuads; q += fields, out += kBlockBytes) {
        for (int i = 0; i < kBlockBytes; ++i) {
            unsigned byte = 0;
            for (int f = 0; f < fields; ++f) byte |= (quads[q + f][i] >> shift & ((1u << bits) - 1)) << (bits * f);
            out[i] = static_cast<uint8_t>(byte);
        }
    }
    return out;
}

/// Entry `column` of the rows of a tile, [rows, columns] elements of so many bytes, one behind the other.
uint8_t* gather_column(const void* values, int element, const GroupedSource& s, int columns, int tile, int column,
                       uint8_t* out) {
    const int rows = std::min(kTileRows, s.rows - tile * kTileRows);
    for (int r = 0; r < rows; ++r) {
        const ptrdiff_t at = static_cast<ptrdiff_t>(tile * kTileRows + r) * columns + column;
        std::memcpy(out + r * element, static_cast<const uint8_t*>(values) + at * element,
                    static_cast<size_t>(element));
    }
    return out + kTileRows * element;
}

/// The scales and offsets of a span, where there are zeros.
void pack_header(const GroupedSource& s, const GroupLayout& g, int tile, int begin, int end, uint8_t* out) {
    const int spans = ceil_div(s.columns, kSpanColumns), groups = ceil_div(s.columns, s.group);
    if (g.has_d()) out = gather_column(s.d, 2, s, spans, tile, begin / kSpanColumns, out);
    if (g.has_dmin()) out = gather_column(s.dmin, 2, s, spans, tile, begin / kSpanColumns, out);
    for (int group = ceil_div(begin, g.group); group < groups && group * g.group < end; ++group) {
        uint8_t* const scales = out;
        out = gather_column(s.scales, g.scale_bytes() / kTileRows, s, groups, tile, group, out);
        if (g.scales == GroupScales::kTwoLevel4) {
            uint8_t mins[kTileRows] = {};
            gather_column(s.offsets, 1, s, groups, tile, group, mins);
            for (int r = 0; r < kTileRows; ++r) scales[r] = static_cast<uint8_t>(scales[r] | mins[r] << 4);
        } else if (g.offset_bytes()) {
            out = gather_column(s.offsets, g.offset_bytes() / kTileRows, s, groups, tile, group, out);
        }
    }
}

/// A whole tile; false if a code has too many bits.
bool pack_tile(const GroupedSource& s, const GroupLayout& g, int tile, uint8_t* out) {
    const int low = g.low_bits(), high = g.strip_blocks() - low;
    bool good = true;
    for (int begin = 0; begin < g.columns; begin = g.span_end(begin)) {
        const int end = g.span_end(begin);
        pack_header(s, g, tile, begin, end, out);
        out += g.header_bytes(begin, end);
        for (int k = begin; k < end; k += kStripColumns) {
            uint8_t quads[kStripQuads][kBlockBytes];
            good = gather_strip(s, tile, k, quads) && good;
            out = pack_plane(quads, low, 0, out);
            if (high) out = pack_plane(quads, high, low, out);
        }
    }
    return good;
}

}  // namespace

GroupedLinear::GroupedLinear(const GroupedSource& source, float scale, const float* bias, Pool& pool, Arena& arena,
                             const Kernels& kernels)
    : Linear(source.rows, source.columns, ActivationFormat::kA8G32, bias),
      layout_(layout_of(source)),
      scale_(scale),
      bias_bits_(source.table                                ? 7
                 : source.offset_form == GroupOffsets::kNone ? source.bits - 1
                                                             : -1),
      kernels_(&kernels) {
    if (fit_nibbles(source)) layout_.scales = GroupScales::kTwoLevel4;
    for (int i = 0; source.table && i < kTableSize; ++i) {
        const bool bytes = layout_.codes == GroupCodes::kTable8;
        const unsigned number = static_cast<unsigned>(source.table[i] + (bytes ? 128 : 128 * 256));
        table_[i] = static_cast<uint8_t>(bytes ? number : number >> 8);
        table_[kTableSize + i] = static_cast<uint8_t>(number);
    }
    const int tiles = ceil_div(rows_, kTileRows);
    const ptrdiff_t tile_bytes = layout_.tile_bytes();
    uint8_t* data = nullptr;
    weights_ = arena.allocate(static_cast<size_t>(tiles * tile_bytes), data);
    std::atomic<bool> good{true};
    pool.run([&](Team& team) {
        const Range mine = team.share(tiles);
        for (int tile = mine.begin; tile < mine.end; ++tile)
            if (!pack_tile(source, layout_, tile, data + tile * tile_bytes)) good = false;
    });
    if (!good) refuse("there is a code that does not fit " + std::to_string(source.bits) + " bits");
}

int64_t GroupedLinear::needed_bytes(const GroupedSource& source) {
    return ceil_div(source.rows, kTileRows) * static_cast<int64_t>(layout_of(source).tile_bytes());
}

std::string GroupedLinear::layout() const {
    const int low = layout_.low_bits(), high = layout_.strip_blocks() - low;
    std::string name = "t16_" + std::to_string(low);
    if (high) name += "+t16_" + std::to_string(high);
    if (layout_.codes == GroupCodes::kTable8) name += "_table8";
    if (layout_.codes == GroupCodes::kTable16) name += "_table16";
    return name + (layout_.group == layout_.columns ? "_row" : "_g" + std::to_string(layout_.group));
}

void GroupedLinear::reserve(int tokens, int threads, Scratch& scratch) const {
    const size_t sums = static_cast<size_t>(waiting_sums(tokens, threads));
    if (scratch.floats.size() < sums) scratch.floats.resize(sums);
}

void GroupedLinear::apply(Range mine, const Activations& x, int tokens, float* out, ptrdiff_t out_stride, Write write,
                          Scratch& scratch) const noexcept {
    const float* sums = scratch.floats.data();
    by_panels(
        mine, tokens, out, out_stride, write, nullptr,
        [&](Range rows, ptrdiff_t stride) {
            kernels_->matmul_groups({weights_.data(), layout_, bias_bits_, table_, rows.begin / kTileRows,
                                     ceil_div(rows.end, kTileRows), x.strips(), x.strip_stride(), tokens,
                                     scratch.floats.data(), stride});
        },
        [=](int t, int r, ptrdiff_t stride) { return sums[t * stride + r]; }, [&](int) { return scale_; });
}

}  // namespace tritkit

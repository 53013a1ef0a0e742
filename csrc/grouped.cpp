#include "grouped.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

namespace tritkit {
namespace {

constexpr int kStripQuads = kStripColumns / 4;

int ceil_div(int n, int d) { return (n + d - 1) / d; }

/// One plane of some strips: `bits` bits of each code from `shift` on. The planes of a strip lie together.
template <int bits, int shift>
void pack_plane(const uint8_t (*quads)[kBlockBytes], int strips, ptrdiff_t strip_bytes, uint8_t* out) {
    constexpr int fields = 8 / bits;
    constexpr unsigned mask = (1u << bits) - 1;
    for (int s = 0; s < strips; ++s, out += strip_bytes) {
        uint8_t* to = out;
        for (int q = 0; q < kStripQuads; q += fields, quads += fields, to += kBlockBytes) {
            for (int i = 0; i < kBlockBytes; ++i) {
                unsigned byte = 0;
                for (int f = 0; f < fields; ++f) byte |= (quads[f][i] >> shift & mask) << (bits * f);
                to[i] = static_cast<uint8_t>(byte);
            }
        }
    }
}

void pack_planes(const GroupLayout& g, const SpanCodes& codes, int strips, uint8_t* out) {
    const ptrdiff_t bytes = g.strip_blocks() * kBlockBytes;
    const int low = g.low_bits(), high = g.strip_blocks() - low;
    if (low == 2) pack_plane<2, 0>(codes.quads, strips, bytes, out);
    if (low == 4) pack_plane<4, 0>(codes.quads, strips, bytes, out);
    if (low == 8) pack_plane<8, 0>(codes.quads, strips, bytes, out);
    uint8_t* const second = out + low * kBlockBytes;
    if (low == 2 && high == 1) pack_plane<1, 2>(codes.quads, strips, bytes, second);
    if (low == 4 && high == 1) pack_plane<1, 4>(codes.quads, strips, bytes, second);
    if (low == 4 && high == 2) pack_plane<2, 4>(codes.quads, strips, bytes, second);
}

/// A whole tile, where there are zeros; false if the source has what the layout cannot hold.
bool pack_tile(const GroupSource& source, const GroupLayout& g, int tile, uint8_t* out) {
    bool good = true;
    for (int begin = 0; begin < g.columns; begin = g.span_end(begin)) {
        const int end = g.span_end(begin), strips = (end - begin) / kStripColumns;
        SpanCodes codes{};
        good = source.read_span(tile, begin, end, out, codes) && good;
        out += g.header_bytes(begin, end);
        pack_planes(g, codes, strips, out);
        out += static_cast<ptrdiff_t>(strips) * g.strip_blocks() * kBlockBytes;
    }
    return good;
}

std::string name_of(const GroupLayout& layout) {
    const int low = layout.low_bits(), high = layout.strip_blocks() - low;
    std::string name = "t16_" + std::to_string(low);
    if (high) name += "+t16_" + std::to_string(high);
    if (layout.codes == GroupCodes::kTable8) name += "_table8";
    if (layout.codes == GroupCodes::kTable16) name += "_table16";
    return name + (layout.group == layout.columns ? "_row" : "_g" + std::to_string(layout.group));
}

}  // namespace

GroupedLinear::GroupedLinear(const GroupSource& source, float scale, const float* bias, Pool& pool, Arena& arena,
                             const Kernels& kernels)
    : Linear(source.rows(), source.columns(), ActivationFormat::kA8G32, bias),
      layout_(source.layout()),
      scale_(scale),
      bias_bits_(source.bias_bits()),
      name_(name_of(layout_)),
      kernels_(&kernels) {
    source.copy_table(table_);
    const int tiles = ceil_div(rows_, kTileRows);
    const ptrdiff_t tile_bytes = layout_.tile_bytes();
    uint8_t* data = nullptr;
    weights_ = arena.allocate(static_cast<size_t>(tiles * tile_bytes), data);
    std::atomic<bool> good{true};
    source.for_each_tile(pool, tiles, [&](int tile) {
        if (!pack_tile(source, layout_, tile, data + tile * tile_bytes)) good = false;
    });
    if (!good) throw std::invalid_argument(source.fault());
}

void GroupedLinear::round_inputs(const InputGrid& grid, const float* row_sums) {
    grid.require_valid();
    if (grid.asymmetric != (row_sums != nullptr))
        throw std::invalid_argument("sums of the rows go with asymmetric inputs, and only with them");
    activations_ = ActivationFormat::kGrid;
    grid_ = grid;
    if (!row_sums) return;
    row_sums_.assign(row_sums, row_sums + rows_);
    for (float& sum : row_sums_) sum /= scale_;  // by_panels multiplies with it
}

int64_t GroupedLinear::needed_bytes(int rows, const GroupLayout& layout) {
    return ceil_div(rows, kTileRows) * static_cast<int64_t>(layout.tile_bytes());
}

void GroupedLinear::reserve(int tokens, int threads, Scratch& scratch) const {
    const size_t sums = static_cast<size_t>(waiting_sums(tokens, threads));
    if (scratch.floats.size() < sums) scratch.floats.resize(sums);
}

void GroupedLinear::apply(Range mine, const Activations& x, int tokens, float* out, ptrdiff_t out_stride, Write write,
                          Scratch& scratch) const noexcept {
    float* const sums = scratch.floats.data();
    const bool on_grid = activations_ == ActivationFormat::kGrid;
    const ActivationStrip* strips = on_grid ? x.strips(place_) : x.strips();
    by_panels(
        mine, tokens, out, out_stride, write, nullptr,
        [&](Range rows, ptrdiff_t stride) {
            kernels_->matmul_groups({weights_.data(), layout_, bias_bits_, table_, rows.begin / kTileRows,
                                     ceil_div(rows.end, kTileRows), strips, x.strip_stride(), tokens, sums, stride,
                                     on_grid && grid_.has_lowest()});
            if (row_sums_.empty()) return;
            const float* shifts = x.shifts(place_);  // x is strip + shift, so W x is W strip + shift * row sums
            for (int t = 0; t < tokens; ++t)
                for (int r = rows.begin; r < rows.end; ++r)
                    sums[t * stride + r - rows.begin] += shifts[t] * row_sums_[static_cast<size_t>(r)];
        },
        [=](int t, int r, ptrdiff_t stride) { return sums[t * stride + r]; }, [&](int) { return scale_; });
}

}  // namespace tritkit

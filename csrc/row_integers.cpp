#include "row_integers.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>

#include "floats.h"
#include "kernels.h"
#include "repack.h"

namespace tritkit {
namespace {

// With few codes it pays to clip the largest weights: shares of the largest one that is kept.
constexpr float kShares[] = {1.0f, 0.85f, 0.7f, 0.58f, 0.48f};

int code_of(float weight, float inverse, float low, float high) {
    float value = weight * inverse;
    value = value < low ? low : value;
    return round_to_int(value > high ? high : value);
}

float squared_error(const float* row, int columns, float scale, float low, float high) {
    const float inverse = 1.0f / scale;
    float partial[8] = {};
    for (int k = 0; k < columns; ++k) {
        const float difference = row[k] - scale * static_cast<float>(code_of(row[k], inverse, low, high));
        partial[k % 8] += difference * difference;
    }
    float sum = 0.0f;
    for (float part : partial) sum += part;
    return sum;
}

/// Not finite if one of the weights is not.
float absolute_maximum(const float* row, int columns) {
    float partial[8] = {}, zeros[8] = {};
    for (int k = 0; k < columns; ++k) {
        const float size = std::fabs(row[k]);
        partial[k % 8] = size > partial[k % 8] ? size : partial[k % 8];
        zeros[k % 8] += row[k] - row[k];
    }
    float largest = 0.0f;
    for (int i = 0; i < 8; ++i) largest = std::max(largest, partial[i]) + zeros[i];
    return largest;
}

struct Chosen {
    float scale, error;
};

Chosen choose_scale(const float* row, int columns, int bits) {
    const float half = static_cast<float>(1 << (bits - 1)), largest = absolute_maximum(row, columns);
    if (largest == 0.0f) return {1.0f, 0.0f};
    if (!std::isfinite(largest)) return {1.0f, largest};
    if (bits > 4) return {largest / (half - 1.0f), 0.0f};
    Chosen best{0.0f, INFINITY};
    for (float share : kShares) {
        const float scale = largest * share / (half - 1.0f);
        const float error = squared_error(row, columns, scale, -half, half - 1.0f);
        if (error < best.error) best = {scale, error};
    }
    return best;
}

std::vector<Plane> planes_of(int bits, int rows, int columns, Arena& arena, std::vector<uint8_t*>& data) {
    std::vector<Plane> planes;
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    auto add = [&](TileLayout layout, int shift) {
        uint8_t* bytes = nullptr;
        const int64_t size = tiles * blocks_of(layout, columns) * kBlockBytes;
        planes.push_back({layout, shift, arena.allocate(static_cast<size_t>(size), bytes)});
        data.push_back(bytes);
    };
    if (bits == 8) add(TileLayout::kT16_8, 0);
    if (bits == 4) add(TileLayout::kT16_4, 0);
    return planes;
}

/// What the largest number of a group may become, as a share of it: -half keeps it, half - 1 may have less error in
/// all.
constexpr float kGroupShares[] = {1.0f, 0.92f, 0.84f, 0.76f};

float squared_error(const float (&group)[kStripColumns], float scale, float low, float high) {
    const float inverse = 1.0f / scale;
    float squares[kStripColumns];
    for (int k = 0; k < kStripColumns; ++k) {
        const float difference = group[k] - scale * static_cast<float>(code_of(group[k], inverse, low, high));
        squares[k] = difference * difference;
    }
    for (int n = kStripColumns / 2; n; n /= 2)
        for (int k = 0; k < n; ++k) squares[k] += squares[k + n];
    return squares[0];
}

/// float16 bits of the scale, and the codes + half.
uint16_t quantize_group(const float (&group)[kStripColumns], int bits, uint8_t* codes) {
    const float half = static_cast<float>(1 << (bits - 1)), low = -half, high = half - 1.0f;
    float largest = 0.0f;
    for (float weight : group) largest = std::fabs(weight) > std::fabs(largest) ? weight : largest;
    uint16_t best = 0;
    float least = INFINITY;
    auto attempt = [&](float scale) {
        const uint16_t found = f16_from_float(scale);
        const float stored = float_from_f16(found);
        if (stored == 0.0f) return;
        const float error = squared_error(group, stored, low, high);
        if (error < least) best = found, least = error;
    };
    if (bits > 4) {
        attempt(largest / low);
    } else {
        for (float share : kGroupShares) {
            attempt(largest * share / low);
            attempt(largest * share / high);
        }
    }
    const float scale = float_from_f16(best), inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
    for (int k = 0; k < kStripColumns; ++k)
        codes[k] = static_cast<uint8_t>(code_of(group[k], inverse, low, high) + (1 << (bits - 1)));
    return best;
}

GroupLayout layout_of_rows(int columns, int bits) {
    if (bits != 4 && bits != 6)
        throw std::invalid_argument("groups of rows can have 4 or 6 bits, not " + std::to_string(bits));
    return {bits == 4 ? GroupCodes::k4 : GroupCodes::k6, GroupScales::kHalf, GroupOffsets::kNone,
            static_cast<int>(round_up(columns, kStripColumns)), kStripColumns};
}

}  // namespace

RowGroups::RowGroups(const RowTable& rows, int bits)
    : GroupSource(rows.rows(), rows.columns(), layout_of_rows(rows.columns(), bits), bits - 1),
      table_(rows),
      bits_(bits) {}

bool RowGroups::read_span(int tile, int begin, int end, uint8_t* header, SpanCodes& codes) const {
    const int first = tile * kTileRows, columns = std::min(end, columns_) - begin;
    bool good = true;
    for (int r = 0; r < kTileRows && first + r < rows_; ++r) {
        float row[kSpanColumns / kStripColumns][kStripColumns] = {};
        table_.copy_columns(first + r, begin, columns, row[0]);
        good = good && std::isfinite(absolute_maximum(row[0], columns));
        for (int k = 0; k < columns; k += kStripColumns) {
            uint8_t group[kStripColumns];
            const uint16_t scale = quantize_group(row[k / kStripColumns], bits_, group);
            std::memcpy(header + k / kStripColumns * layout_.scale_bytes() + 2 * r, &scale, sizeof scale);
            for (int i = 0; i < kStripColumns; i += 4) std::memcpy(codes.quads[(k + i) / 4] + 4 * r, group + i, 4);
        }
    }
    if (end == layout_.columns) table_.looked_up(kTileRows, false);
    return good;
}

RowIntegers quantize_rows(const RowTable& source, int bits, Pool& pool, Arena& arena) {
    if (bits != 4 && bits != 8) throw std::invalid_argument("rows can have 4 or 8 bits, not " + std::to_string(bits));
    const int rows = source.rows(), columns = source.columns(), half = 1 << (bits - 1);
    std::vector<uint8_t*> data;
    RowIntegers out{rows, columns, half, planes_of(bits, rows, columns, arena, data), {}, {}};
    out.scales.resize(static_cast<size_t>(rows));
    out.errors.resize(static_cast<size_t>(rows));
    const ptrdiff_t padded = code_stride(columns);
    std::atomic<bool> finite{true};
    pool.run([&](Team& team) {
        std::vector<float> row(static_cast<size_t>(columns));
        std::vector<uint8_t> own(static_cast<size_t>(padded), static_cast<uint8_t>(half));  // of a row
        std::vector<uint8_t> codes(own.size() * kTileRows), part(codes.size());
        const Range tiles = team.share((rows + kTileRows - 1) / kTileRows);
        for (int tile = tiles.begin; tile < tiles.end; ++tile) {
            std::fill(codes.begin(), codes.end(), static_cast<uint8_t>(half));
            for (int r = tile * kTileRows; r < rows && r < (tile + 1) * kTileRows; ++r) {
                source.copy_row(r, row.data());
                const auto [scale, error] = choose_scale(row.data(), columns, bits);
                if (!std::isfinite(error)) finite = false;
                out.scales[r] = scale;
                out.errors[r] = std::sqrt(error);
                const float inverse = 1.0f / scale, low = static_cast<float>(-half),
                            high = static_cast<float>(half - 1);
                for (int k = 0; k < columns; ++k)
                    own[static_cast<size_t>(k)] =
                        static_cast<uint8_t>(code_of(row[static_cast<size_t>(k)], inverse, low, high) + half);
                for (int k = 0; k < columns; k += 4)  // own ends with codes of no weight
                    std::memcpy(codes.data() + k / 4 * kBlockBytes + 4 * (r % kTileRows), own.data() + k, 4);
            }
            source.looked_up(kTileRows, false);
            for (size_t i = 0; i < out.planes.size(); ++i) {
                const Plane& plane = out.planes[i];
                const unsigned mask = static_cast<unsigned>(facts(plane.layout).levels - 1);
                for (size_t at = 0; at < codes.size(); ++at)
                    part[at] = static_cast<uint8_t>(codes[at] >> plane.shift & mask);
                const int blocks = blocks_of(plane.layout, columns);
                pack_codes(plane.layout, part.data(), blocks,
                           data[i] + static_cast<ptrdiff_t>(tile) * blocks * kBlockBytes);
            }
        }
    });
    if (!finite) throw std::invalid_argument("the rows hold a value that is not finite");
    return out;
}

}  // namespace tritkit

#include "input_grid.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "floats.h"

namespace tritkit {
namespace {

struct Range1D {
    float low = 0.0f, high = 0.0f;  // zero is always inside
};

/// In lanes, so that it vectorizes.
Range1D range_of(const float* x, int n) {
    constexpr int kLanes = 8;
    float low[kLanes] = {}, high[kLanes] = {};
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int j = 0; j < kLanes; ++j) low[j] = x[i + j] < low[j] ? x[i + j] : low[j];
        for (int j = 0; j < kLanes; ++j) high[j] = x[i + j] > high[j] ? x[i + j] : high[j];
    }
    Range1D r;
    for (; i < n; ++i) {
        r.low = x[i] < r.low ? x[i] : r.low;
        r.high = x[i] > r.high ? x[i] : r.high;
    }
    for (int j = 0; j < kLanes; ++j) {
        r.low = low[j] < r.low ? low[j] : r.low;
        r.high = high[j] > r.high ? high[j] : r.high;
    }
    return r;
}

/// Of float16's numbers below 2^-14 those that still have four bits.
constexpr float kSmallestScale = 0x1p-20f;

/// Scales of groups are float16 numbers, as they are where they are stored.
float scale_of(const InputGrid& grid, Range1D r) {
    const float top = static_cast<float>(grid.hi);
    float scale = grid.asymmetric ? (r.high - r.low) / top : std::max(-r.low, r.high) / top;
    if (!(scale > 0.0f)) scale = 1.0f;
    if (grid.group == 0) return scale;
    scale = std::min(std::max(scale, kSmallestScale), 65504.0f);
    if (scale < 0x1p-14f) return std::ceil(scale * 0x1p24f) * 0x1p-24f;  // few bits are left: up, so nothing is clipped
    return float_from_f16(f16_from_float(scale));
}

struct Rounding {
    float lo, hi, offset, inverse;
    int center;
};

/// Halves to even; what is not a number becomes the lowest code.
void round_columns(const Rounding& r, const float* x, int count, int32_t* codes) {
    for (int i = 0; i < count; ++i) {
        float value = (x[i] - r.offset) * r.inverse;
        value = value > r.lo ? value : r.lo;
        codes[i] = round_to_int(value < r.hi ? value : r.hi) - r.center;
    }
}

void round_strip(const Rounding& r, const float* x, int count, ActivationStrip& strip) {
    int32_t codes[kStripColumns] = {};
    if (count < kStripColumns) {
        round_columns(r, x, count, codes);
        return set_codes(codes, count, strip);
    }
    // The same in loops of known lengths, which vectorize.
    round_columns(r, x, kStripColumns, codes);
    int32_t sums[kStripColumns / kGroupUnit] = {};
    for (int i = 0; i < kStripColumns; ++i) strip.codes[i] = static_cast<int8_t>(codes[i]);
    for (int half = 0; half < 2; ++half)
        for (int i = 0; i < kGroupUnit; ++i) sums[half] += codes[half * kGroupUnit + i];
    const int32_t starts[] = {-sums[0], -sums[1], -sums[0] - sums[1], 0};
    std::copy(starts, starts + 4, strip.starts);
    for (int i = 0; i < 3; ++i) strip.moments[i] = strip.scale * static_cast<float>(-starts[i]);
}

}  // namespace

void InputGrid::require_valid() const {
    auto require = [](bool good, const std::string& message) {
        if (!good) throw std::invalid_argument("the grid of inputs " + message);
    };
    require(lo < hi && (asymmetric ? lo == 0 && hi <= 255 : lo >= -128 && hi <= 127 && hi > 0),
            "has codes from " + std::to_string(lo) + " to " + std::to_string(hi));
    require(group >= 0 && group % kStripColumns == 0, "has a scale for " + std::to_string(group) +
                                                          " columns, expected a multiple of " +
                                                          std::to_string(kStripColumns));
    require(group == 0 || !(asymmetric || scale > 0.0f), "is symmetric and dynamic where it has groups");
    require(!(peak > 0.0f && (asymmetric || scale > 0.0f)), "has a peak where its scale is not the absmax");
    require(std::isfinite(peak) && std::isfinite(scale) && scale >= 0.0f && std::isfinite(zero),
            "has numbers that are not finite");
}

float quantize_inputs(const InputGrid& grid, const float* x, int columns, ActivationStrip* strips) {
    const int group = grid.group ? grid.group : columns;
    float shift = 0.0f;
    for (int begin = 0; begin < columns; begin += group) {
        const int end = std::min(begin + group, columns);
        float scale = grid.scale, zero = grid.zero, inverse = 0.0f;
        const Range1D range = scale > 0.0f ? Range1D{} : range_of(x + begin, end - begin);
        if (grid.peak > 0.0f) {
            inverse = 1.0f / std::max(std::max(-range.low, range.high), 1e-5f) * grid.peak;  // torch's 127 / absmax
            scale = 1.0f / inverse;
        } else if (scale <= 0.0f) {
            scale = scale_of(grid, range);
            if (grid.asymmetric) zero = std::min(std::nearbyintf(-range.low / scale), static_cast<float>(grid.hi));
        }
        if (grid.peak <= 0.0f) inverse = 1.0f / scale;
        const int lowest = grid.has_lowest() ? grid.lo : std::max(grid.lo, -127);
        const Rounding rounding{static_cast<float>(lowest), static_cast<float>(grid.hi),
                                grid.asymmetric ? -scale * zero : 0.0f, inverse, grid.center()};
        for (int k = begin; k < end; k += kStripColumns, ++strips) {
            strips->scale = scale;
            round_strip(rounding, x + k, std::min(end - k, kStripColumns), *strips);
        }
        if (grid.asymmetric) shift = scale * (static_cast<float>(grid.center()) - zero);
    }
    return shift;
}

}  // namespace tritkit

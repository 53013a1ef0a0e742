// Formats of the inputs of a linear that are data: a grid for each token, for groups of its columns, or one for all
// tokens from calibration. The codes go where those of a8_g32 go (group_layout.h), so the products are the same.
#pragma once

#include "kernels.h"

namespace tritkit {

/// x ~ scale * (code - zero), lo <= code <= hi. The same float32 operations in the same order as tritkit/formats has
/// them, so that the codes are the same.
struct InputGrid {
    int lo, hi;
    int group = 0;            // columns of a token that share a scale, a multiple of 32; 0: the whole token
    bool asymmetric = false;  // lo = 0, and `zero` is wanted too; only with group 0
    float scale = 0.0f;       // of all tokens; 0: found for each
    float zero = 0.0f;        // of all tokens
    float peak = 0.0f;        // above 0: inverse = 1 / max(absmax, 1e-5) * peak, as BitNet's activations have it

    /// Throws std::invalid_argument.
    void require_valid() const;
    /// What is taken away from codes that do not fit int8.
    int center() const { return hi > 127 ? 128 : 0; }
    /// Whether -128 is a code. Where the scale is the token's own absmax / 127 it would take subnormal inputs.
    bool has_lowest() const {
        const bool fitted = scale <= 0.0f && peak <= 127.0f && group == 0 && !asymmetric;
        return lo - center() == -128 && !fitted;
    }
    bool operator==(const InputGrid& o) const {
        return lo == o.lo && hi == o.hi && group == o.group && asymmetric == o.asymmetric && scale == o.scale &&
               zero == o.zero && peak == o.peak;
    }
};

/// Codes of a row of x, minus the centre. Returns scale * (centre - zero), which every input has lost; 0 where there is
/// neither.
float quantize_inputs(const InputGrid& grid, const float* x, int columns, ActivationStrip* strips);

}  // namespace tritkit

// The parts of the Python module, and what they share.
#pragma once

#include "bindings_arrays.h"

namespace tritkit {

void bind_quantizers(nb::module_& m);  // ggml's
void bind_linears(nb::module_& m);     // matrices, tables of rows, heads
void bind_decoder(nb::module_& m);     // and the sampler
void bind_hooks(nb::module_& m);       // for tests

std::shared_ptr<Linear> new_linear(Runner& runner, const std::string& layout, const Array& data, int rows, int columns,
                                   float scale, const std::optional<std::string>& activations,
                                   const std::optional<Array>& bias, bool mapped, const std::string& skip);

Rotary rotary_of(const Array& frequencies, int head_dim, float factor);

}  // namespace tritkit

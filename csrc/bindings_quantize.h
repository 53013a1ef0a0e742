#pragma once

#include <nanobind/nanobind.h>

namespace tritkit {

void bind_quantizers(nanobind::module_& m);

}  // namespace tritkit

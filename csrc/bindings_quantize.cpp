// The quantisers of ggml for Python; tritkit/layouts/search.py is their face and says in words what these refuse.
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>

#include "bindings.h"
#include "ggml_quantize.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tritkit {
namespace {

using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Row = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

nb::object quantize_blocks(const std::string& name, const Matrix& w, const std::optional<Row>& importance,
                           int threads) {
    const ggml::Quantizer* quantizer = nullptr;
    for (const ggml::Quantizer& q : ggml::quantizers())
        if (q.name == name) quantizer = &q;
    if (!quantizer) throw nb::value_error(("there is no quantizer " + name).c_str());
    const BlockType& type = *ggml::find_block_type(name);
    constexpr size_t kMost = 1u << 30;
    if (w.shape(0) > kMost || w.shape(1) > kMost || w.shape(1) % type.columns)
        throw nb::value_error((name + " wants rows of whole blocks").c_str());
    if (importance && importance->shape(0) != w.shape(1))
        throw nb::value_error("importance has another length than a row");
    const size_t row_bytes = w.shape(1) / type.columns * type.bytes;
    auto* out = new uint8_t[w.shape(0) * row_bytes]();
    nb::capsule owner(out, [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
    {
        nb::gil_scoped_release release;
        Pool pool(threads);
        ggml::quantize_rows(*quantizer, w.data(), importance ? importance->data() : nullptr,
                            static_cast<int>(w.shape(0)), static_cast<int>(w.shape(1)), out, pool);
    }
    return nb::cast(nb::ndarray<nb::numpy, uint8_t>(out, {w.shape(0), row_bytes}, owner));
}

}  // namespace

void bind_quantizers(nb::module_& m) {
    m.def("quantize_blocks", &quantize_blocks, "name"_a, "w"_a, "importance"_a.none() = nb::none(), "threads"_a = 0,
          "Bytes uint8 [rows, row bytes] of float32 w [rows, columns] in a type of ggml.");
}

}  // namespace tritkit

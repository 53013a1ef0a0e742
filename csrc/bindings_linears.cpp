// Matrices for Python: what a file holds of them, in a run-time layout.
#include "bindings.h"
#include "grouped.h"

namespace tritkit {
namespace {

/// A matrix of a file; nothing is read yet.
Stored stored(const std::string& layout, const Array& data, int rows, int columns, bool mapped) {
    const SourceLayout& source = source_layout(layout);
    if (rows < 1 || columns < 1) throw nb::value_error("rows and columns must be positive");
    if (!is_contiguous(data)) throw nb::value_error("data must be C-contiguous");
    if (!source.padded && columns % source.block_columns)
        throw nb::value_error((layout + " has blocks of " + std::to_string(source.block_columns) +
                               " columns, which does not divide " + std::to_string(columns))
                                  .c_str());
    if (static_cast<int64_t>(data.nbytes()) != source.source_bytes(rows, columns))
        throw nb::value_error(("data has " + std::to_string(data.nbytes()) + " bytes, expected " +
                               std::to_string(source.source_bytes(rows, columns)) + " for " + layout + " [" +
                               std::to_string(rows) + ", " + std::to_string(columns) + "]")
                                  .c_str());
    return {source, bytes_of(data), rows, columns, mapped};
}

Skip skip_of(const std::string& name) {
    if (name == "nothing") return Skip::kNothing;
    if (name == "outputs") return Skip::kOutputs;
    if (name == "inputs") return Skip::kInputs;
    throw nb::value_error(("skip is '" + name + "', expected nothing, outputs or inputs").c_str());
}

int64_t runtime_bytes(const Runner& runner, const std::string& layout, const Array& data, int rows, int columns,
                      const std::optional<std::string>& activations, const std::string& skip) {
    return needed_bytes(stored(layout, data, rows, columns, false), runner.ternary, skip_of(skip),
                        activations.value_or(""));
}

}  // namespace

std::shared_ptr<Linear> new_linear(Runner& runner, const std::string& layout, const Array& data, int rows, int columns,
                                   float scale, const std::optional<std::string>& activations,
                                   const std::optional<Array>& bias, bool mapped, const std::string& skip) {
    const Stored source = stored(layout, data, rows, columns, mapped);
    const float* bias_data = bias ? checked<float>(*bias, "bias", {rows}) : nullptr;
    const Skip skipped = skip_of(skip);
    nb::gil_scoped_release release;
    return make_linear(source, runner.ternary, skipped, scale, activations.value_or(""), bias_data, runner.pool,
                       runner.arena, runner.kernels);
}

namespace {

InputGrid new_grid(int lo, int hi, int group, bool asymmetric, float scale, float zero, float peak) {
    const InputGrid grid{lo, hi, group, asymmetric, scale, zero, peak};
    grid.require_valid();
    return grid;
}

void round_inputs(Linear& linear, const InputGrid& grid, const std::optional<Array>& row_sums) {
    auto* grouped = dynamic_cast<GroupedLinear*>(&linear);
    if (!grouped) throw nb::value_error("only inputs of codes in groups or blocks can be rounded to a grid");
    grouped->round_inputs(grid, row_sums ? checked<float>(*row_sums, "row_sums", {linear.rows()}) : nullptr);
}

/// A copy of the rows with 4 or 6 bits in groups or 8 bits, or with `exact` one of 4 bits that screens.
std::shared_ptr<Head> quantized_head(Runner& runner, std::shared_ptr<RowTable> rows, int bits,
                                     std::optional<std::shared_ptr<Linear>> exact) {
    auto floats = std::dynamic_pointer_cast<FloatLinear>(exact.value_or(nullptr));
    if (exact) {
        if (!floats) throw nb::value_error("the exact head must have floats");
        require_shape(*floats, "the exact head", rows->rows(), rows->columns());
    }
    nb::gil_scoped_release release;
    if (!exact && bits < 8)
        return std::make_shared<Head>(std::make_shared<GroupedLinear>(RowGroups(*rows, bits), 1.0f, nullptr,
                                                                      runner.pool, runner.arena, runner.kernels));
    RowIntegers codes = quantize_rows(*rows, bits, runner.pool, runner.arena);
    std::vector<float> errors = std::move(codes.errors);
    auto copy = std::make_shared<TileLinear>(std::move(codes), runner.kernels);
    if (!floats) return std::make_shared<Head>(std::move(copy));
    return std::make_shared<Head>(std::move(copy), std::move(floats), std::move(rows), std::move(errors));
}

std::shared_ptr<RowTable> new_row_table(const std::string& layout, const Array& data, int rows, int columns,
                                        float scale, bool drop_pages) {
    return std::make_shared<StoredRows>(stored(layout, data, rows, columns, drop_pages), scale);
}

nb::object row_of(const RowTable& table, int r) {
    if (r < 0 || r >= table.rows()) throw nb::value_error("there is no such row");
    float* row = nullptr;
    nb::object array = new_array(row, {static_cast<size_t>(table.columns())});
    table.copy_row(r, row);
    return array;
}

// --- Matrices with scales for groups of columns.

/// The arrays stay the caller's.
GroupArrays group_arrays(const Array& codes, int bits, int group, const Array& scales, const OptionalArray& d,
                         const OptionalArray& zeros, const OptionalArray& offsets, const OptionalArray& mins,
                         const OptionalArray& dmin, const OptionalArray& table, int columns, int field_bits) {
    GroupArrays s{};
    s.codes = checked<uint8_t>(codes, "codes", 2);
    s.rows = static_cast<int>(codes.shape(0));
    s.columns = columns ? columns : static_cast<int>(codes.shape(1));
    s.bits = bits;
    s.field_bits = field_bits;
    s.group = group;
    if (field_bits < 1 || field_bits > 8) throw nb::value_error("field_bits must be 1 to 8");
    checked<uint8_t>(codes, "codes", {s.rows, s.row_bytes()});
    if (s.rows < 1 || s.columns < 1 || group < 1) throw nb::value_error("rows, columns and group must be positive");
    if ((zeros ? 1 : 0) + (offsets ? 1 : 0) + (mins ? 1 : 0) > 1)
        throw nb::value_error("only one of zeros, offsets and mins may be given");
    if (mins.has_value() != dmin.has_value()) throw nb::value_error("mins and dmin go together");
    const int64_t groups = (s.columns + int64_t{group} - 1) / group, spans = (s.columns + 255) / 256;
    bool half = false;
    if (d) {
        s.scale_form = GroupScales::kTwoLevel;
        s.d = checked_halves(*d, "d", {s.rows, spans});
        s.scales = checked<int8_t>(scales, "scales", {s.rows, groups});
    } else {
        s.scales = checked_floats(scales, "scales", {s.rows, groups}, half);
        s.scale_form = half ? GroupScales::kHalf : GroupScales::kFloat;
    }
    s.offset_form = GroupOffsets::kNone;
    if (zeros) {
        s.offset_form = GroupOffsets::kZeros;
        s.offsets = checked<uint8_t>(*zeros, "zeros", {s.rows, groups});
    }
    if (offsets) {
        s.offsets = checked_floats(*offsets, "offsets", {s.rows, groups}, half);
        s.offset_form = half ? GroupOffsets::kHalf : GroupOffsets::kFloat;
    }
    if (mins) {
        s.offset_form = GroupOffsets::kMins;
        s.offsets = checked<uint8_t>(*mins, "mins", {s.rows, groups});
        s.dmin = checked_halves(*dmin, "dmin", {s.rows, spans});
    }
    if (table) s.table = checked<int16_t>(*table, "table", {16});
    return s;
}

int64_t grouped_bytes(const Array& codes, int bits, int group, const Array& scales, const OptionalArray& d,
                      const OptionalArray& zeros, const OptionalArray& offsets, const OptionalArray& mins,
                      const OptionalArray& dmin, const OptionalArray& table, int columns, int field_bits) {
    const ArraySource source(
        group_arrays(codes, bits, group, scales, d, zeros, offsets, mins, dmin, table, columns, field_bits));
    return GroupedLinear::needed_bytes(source.rows(), source.layout());
}

std::shared_ptr<GroupedLinear> new_grouped(Runner& runner, const Array& codes, int bits, int group, const Array& scales,
                                           const OptionalArray& d, const OptionalArray& zeros,
                                           const OptionalArray& offsets, const OptionalArray& mins,
                                           const OptionalArray& dmin, const OptionalArray& table, float scale,
                                           const OptionalArray& bias, int columns, int field_bits) {
    const ArraySource source(
        group_arrays(codes, bits, group, scales, d, zeros, offsets, mins, dmin, table, columns, field_bits));
    const float* bias_data = bias ? checked<float>(*bias, "bias", {source.rows()}) : nullptr;
    nb::gil_scoped_release release;
    return std::make_shared<GroupedLinear>(source, scale, bias_data, runner.pool, runner.arena, runner.kernels);
}

std::shared_ptr<RowTable> new_group_rows(const Array& codes, int bits, int group, const Array& scales,
                                         const OptionalArray& zeros, const OptionalArray& table, float scale,
                                         int columns, int field_bits) {
    const OptionalArray none;
    const GroupArrays arrays =
        group_arrays(codes, bits, group, scales, none, zeros, none, none, none, table, columns, field_bits);
    std::vector<Bytes> owners{bytes_of(codes), bytes_of(scales)};
    for (const OptionalArray& array : {zeros, table})
        if (array) owners.push_back(bytes_of(*array));
    return std::make_shared<GroupRows>(arrays, std::move(owners), scale);
}

}  // namespace

void bind_linears(nb::module_& m) {
    m.def("runtime_bytes", &runtime_bytes, "runner"_a, "layout"_a, "data"_a, "rows"_a, "cols"_a,
          "activations"_a.none() = nb::none(), "skip"_a = "nothing", "Bytes that a Linear would allocate.");

    nb::class_<InputGrid>(m, "InputGrid", "What the inputs of a linear are rounded to: csrc/input_grid.h.")
        .def(nb::new_(&new_grid), "lo"_a, "hi"_a, "group"_a = 0, "asymmetric"_a = false, "scale"_a = 0.0f,
             "zero"_a = 0.0f, "peak"_a = 0.0f);

    nb::class_<Linear>(m, "Linear", "One matrix in its run-time layout.")
        .def(nb::new_(&new_linear), "runner"_a, "layout"_a, "data"_a, "rows"_a, "cols"_a, "scale"_a,
             "activations"_a.none(), "bias"_a.none(), "mapped"_a = false, "skip"_a = "nothing")
        .def("round_inputs", &round_inputs, "grid"_a, "row_sums"_a.none() = nb::none(),
             "Rounds what it is given to this grid; row_sums: float32 [rows], with asymmetric grids.")
        .def_prop_ro("bytes", &Linear::bytes)
        .def_prop_ro("layout", &Linear::layout);

    nb::class_<GroupedLinear, Linear>(m, "GroupedLinear", "Codes of 2 to 8 bits with scales for groups of columns.")
        .def(nb::new_(&new_grouped), "runner"_a, "codes"_a, "bits"_a, "group"_a, "scales"_a, "d"_a = nb::none(),
             "zeros"_a = nb::none(), "offsets"_a = nb::none(), "mins"_a = nb::none(), "dmin"_a = nb::none(),
             "table"_a = nb::none(), "scale"_a = 1.0f, "bias"_a = nb::none(), "cols"_a = 0, "field_bits"_a = 8);
    m.def("grouped_bytes", &grouped_bytes, "codes"_a, "bits"_a, "group"_a, "scales"_a, "d"_a = nb::none(),
          "zeros"_a = nb::none(), "offsets"_a = nb::none(), "mins"_a = nb::none(), "dmin"_a = nb::none(),
          "table"_a = nb::none(), "cols"_a = 0, "field_bits"_a = 8,
          "Bytes that a GroupedLinear would allocate at most.");

    nb::class_<RowTable>(m, "RowTable", "Rows of floats, blocks or codes, looked up where they lie.")
        .def(nb::new_(&new_row_table), "layout"_a, "data"_a, "rows"_a, "cols"_a, "scale"_a, "drop_pages"_a = false)
        .def_static("grouped", &new_group_rows, "codes"_a, "bits"_a, "group"_a, "scales"_a, "zeros"_a = nb::none(),
                    "table"_a = nb::none(), "scale"_a = 1.0f, "cols"_a = 0, "field_bits"_a = 8)
        .def("row", &row_of, "r"_a, "float32 [columns].");

    nb::class_<Head>(m, "Head", "The output head.")
        .def(nb::new_([](std::shared_ptr<Linear> linear) { return std::make_shared<Head>(std::move(linear)); }),
             "linear"_a)
        .def(nb::new_(&quantized_head), "runner"_a, "rows"_a, "bits"_a, "exact"_a.none() = nb::none())
        .def_prop_ro("bytes", &Head::bytes)
        .def_prop_ro("layout", [](const Head& h) { return h.linear().layout(); })
        .def_prop_ro("rescored_rows", &Head::rescored_rows)
        .def_prop_ro("screened_tokens", &Head::screened_tokens);
}

}  // namespace tritkit

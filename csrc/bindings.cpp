// Only this file and bindings_quantize.cpp know Python. Checks dtypes, shapes and contiguity, raises ValueError. It
// computes nothing but in the hooks for the tests, which run one linear or the quantizer without a decoder.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <numeric>
#include <optional>

#include "bindings_quantize.h"
#include "decoder.h"
#include "grouped.h"
#include "machine.h"
#include "sampling.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace tritkit;

namespace {

using Array = nb::ndarray<nb::ro, nb::device::cpu>;
using Release = nb::call_guard<nb::gil_scoped_release>;

std::string shape_of(const Array& a) {
    std::string text = "[";
    for (size_t i = 0; i < a.ndim(); ++i) text += (i ? ", " : "") + std::to_string(a.shape(i));
    return text + "]";
}

bool is_contiguous(const Array& a) {
    int64_t expected = 1;
    for (size_t i = a.ndim(); i-- > 0;) {
        if (a.size() && a.shape(i) != 1 && a.stride(i) != expected) return false;
        expected *= static_cast<int64_t>(a.shape(i));
    }
    return true;
}

std::string dtype_name(nb::dlpack::dtype type) {
    const char* kinds[] = {"int", "uint", "float"};
    return (type.code < 3 ? kinds[type.code] : "another kind of ") + std::to_string(type.bits);
}

/// The data of a contiguous array of this rank.
const void* checked_data(const Array& a, const char* name, size_t rank) {
    const std::string what(name);
    if (a.ndim() != rank)
        throw nb::value_error(
            (what + " has shape " + shape_of(a) + ", expected " + std::to_string(rank) + " dimensions").c_str());
    if (!is_contiguous(a)) throw nb::value_error((what + " must be C-contiguous").c_str());
    return a.data();
}

const void* checked_data(const Array& a, const char* name, std::initializer_list<int64_t> shape) {
    const void* data = checked_data(a, name, shape.size());
    size_t i = 0;
    std::string expected;
    bool good = true;
    for (int64_t n : shape) {
        good = good && static_cast<int64_t>(a.shape(i++)) == n;
        expected += (expected.empty() ? "" : ", ") + std::to_string(n);
    }
    if (!good)
        throw nb::value_error(
            (std::string(name) + " has shape " + shape_of(a) + ", expected [" + expected + "]").c_str());
    return data;
}

/// The same for elements of T; `shape` is the rank or all dimensions.
template <class T, class Shape = std::initializer_list<int64_t>>
const T* checked(const Array& a, const char* name, Shape shape) {
    if (a.dtype() != nb::dtype<T>())
        throw nb::value_error(
            (std::string(name) + " is " + dtype_name(a.dtype()) + ", expected " + dtype_name(nb::dtype<T>())).c_str());
    return static_cast<const T*>(checked_data(a, name, shape));
}

template <class T>
nb::object new_array(T*& data, std::initializer_list<size_t> shape) {
    size_t size = 1;
    for (size_t n : shape) size *= n;
    data = new T[size]();
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return nb::cast(nb::ndarray<nb::numpy, T>(data, shape, owner));
}

/// The bytes of an array and what keeps them alive, for objects that read them where they lie.
Bytes bytes_of(const Array& a) {
    std::shared_ptr<const void> owner(new Array(a), [](const Array* array) {
        nb::gil_scoped_acquire acquire;
        delete array;
    });
    return Bytes(std::move(owner), static_cast<const uint8_t*>(a.data()), a.nbytes());
}

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

template <class Matrix>
void require_shape(const Matrix& linear, const char* name, int rows, int columns) {
    if (linear.rows() != rows || linear.columns() != columns)
        throw nb::value_error((std::string(name) + " has shape [" + std::to_string(linear.rows()) + ", " +
                               std::to_string(linear.columns()) + "], expected [" + std::to_string(rows) + ", " +
                               std::to_string(columns) + "]")
                                  .c_str());
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

Norm norm(const std::optional<Array>& a, const char* name, int size) {
    if (!a) return {};
    const float* data = checked<float>(*a, name, {size});
    return Norm(data, data + size);
}

// --- Matrices with scales for groups of columns.

using OptionalArray = std::optional<Array>;

/// float16 as its bits.
const uint16_t* checked_halves(const Array& a, const char* name, std::initializer_list<int64_t> shape) {
    if (a.dtype() != nb::dlpack::dtype{static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1})
        throw nb::value_error((std::string(name) + " is " + dtype_name(a.dtype()) + ", expected float16").c_str());
    return static_cast<const uint16_t*>(checked_data(a, name, shape));
}

const void* checked_floats(const Array& a, const char* name, std::initializer_list<int64_t> shape, bool& half) {
    half = a.dtype().bits == 16;
    return half ? static_cast<const void*>(checked_halves(a, name, shape)) : checked<float>(a, name, shape);
}

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

std::shared_ptr<Linear> linear_of(const nb::dict& layer, const char* name, int rows, int columns) {
    auto linear = nb::cast<std::shared_ptr<Linear>>(layer[name]);
    require_shape(*linear, name, rows, columns);
    return linear;
}

LinearPtr adapter_of(const nb::dict& layer, int hidden) {
    if (layer["adapter"].is_none()) return nullptr;
    auto adapter = linear_of(layer, "adapter", hidden, hidden);
    if (adapter->activations() != ActivationFormat::kFloat) throw nb::value_error("an adapter must have floats");
    return adapter;
}

Norm norm_of(const nb::dict& layer, const char* name, int size) {
    return norm(nb::cast<std::optional<Array>>(layer[name]), name, size);
}

Layer layer_of(const nb::dict& d, const DecoderShape& s) {
    const int q = s.heads.heads * s.heads.head_dim, kv = s.heads.kv_heads * s.heads.head_dim;
    const auto q_proj = linear_of(d, "q", q, s.hidden_size), k_proj = linear_of(d, "k", kv, s.hidden_size),
               v_proj = linear_of(d, "v", kv, s.hidden_size),
               gate = linear_of(d, "gate", s.intermediate_size, s.hidden_size),
               up = linear_of(d, "up", s.intermediate_size, s.hidden_size);
    share_places({q_proj.get(), k_proj.get(), v_proj.get()});
    share_places({gate.get(), up.get()});
    return {q_proj,
            k_proj,
            v_proj,
            linear_of(d, "o", s.hidden_size, q),
            gate,
            up,
            linear_of(d, "down", s.hidden_size, s.intermediate_size),
            norm_of(d, "input_norm", s.hidden_size),
            norm_of(d, "post_attention_norm", s.hidden_size),
            norm_of(d, "attn_sub_norm", q),
            norm_of(d, "ffn_sub_norm", s.intermediate_size),
            norm_of(d, "q_norm", s.heads.head_dim),
            norm_of(d, "k_norm", s.heads.head_dim),
            {norm_of(d, "q_own_norm", s.hidden_size), norm_of(d, "k_own_norm", s.hidden_size),
             norm_of(d, "v_own_norm", s.hidden_size), norm_of(d, "o_own_norm", q),
             norm_of(d, "gate_own_norm", s.hidden_size), norm_of(d, "up_own_norm", s.hidden_size),
             norm_of(d, "down_own_norm", s.intermediate_size)},
            adapter_of(d, s.hidden_size)};
}

Rotary rotary_of(const Array& frequencies, int head_dim, float factor) {
    if (head_dim < 2 || head_dim % 2) throw nb::value_error("head_dim must be even");
    return {norm(frequencies, "inverse_frequencies", head_dim / 2), factor};
}

DecoderShape shape_from(const nb::dict& d) {
    auto whole = [&](const char* name) {
        const int value = nb::cast<int>(d[name]);
        if (value < 1) throw nb::value_error((std::string(name) + " must be positive").c_str());
        return value;
    };
    DecoderShape s{whole("vocab_size"),
                   whole("hidden_size"),
                   whole("intermediate_size"),
                   {whole("num_heads"), whole("num_kv_heads"), whole("head_dim")},
                   {},
                   nb::cast<float>(d["rms_norm_eps"]),
                   gate_activation(nb::cast<std::string>(d["activation"])),
                   whole("context_length")};
    if (s.heads.heads % s.heads.kv_heads) throw nb::value_error("num_heads must be a multiple of num_kv_heads");
    s.rotary =
        rotary_of(nb::cast<Array>(d["inverse_frequencies"]), s.heads.head_dim, nb::cast<float>(d["attention_factor"]));
    s.linear_norm_eps = nb::cast<float>(d["linear_norm_eps"]);
    return s;
}

void init_decoder(Decoder* self, std::shared_ptr<Runner> runner, const nb::dict& shape,
                  std::shared_ptr<RowTable> embedding, const nb::list& layers, const Array& final_norm,
                  std::shared_ptr<Head> head, int kv_bits, std::optional<std::pair<double, double>> density) {
    const DecoderShape s = shape_from(shape);
    require_shape(*embedding, "embedding", s.vocab_size, s.hidden_size);
    require_shape(*head, "head", s.vocab_size, s.hidden_size);
    if (density && !(density->first >= density->second && density->second >= 0.0 && density->first <= 1.0))
        throw nb::value_error("density must be two shares, 1 >= up >= down >= 0");
    const Density forced = density ? Density{density->first, density->second} : Density{};
    std::vector<Layer> built;
    for (nb::handle layer : layers) built.push_back(layer_of(nb::cast<nb::dict>(layer), s));
    new (self)
        Decoder(std::move(runner), s, std::move(embedding), std::move(built),
                norm(final_norm, "final_norm", s.hidden_size), std::move(head), kv_bits, density ? &forced : nullptr);
}

Want want_of(const std::string& name) {
    if (name == "none") return Want::kNone;
    if (name == "last") return Want::kLast;
    if (name == "all") return Want::kAll;
    if (name == "nll") return Want::kNll;
    throw nb::value_error(("want is '" + name + "', expected none, last, all or nll").c_str());
}

/// (sequence, tokens, want, targets), without a place for the results. The arrays stay alive in the tuple.
Job job_of(nb::handle item) {
    const nb::tuple fields = nb::cast<nb::tuple>(item);
    const Array tokens = nb::cast<Array>(fields[1]);
    const auto targets = nb::cast<std::optional<Array>>(fields[3]);
    Job job{nb::cast<int>(fields[0]),
            checked<int32_t>(tokens, "tokens", 1),
            static_cast<int>(tokens.shape(0)),
            want_of(nb::cast<std::string>(fields[2])),
            nullptr,
            nullptr};
    if (job.want == Want::kNll) {
        if (!targets) throw nb::value_error("want is 'nll' but targets is None");
        job.targets = checked<int32_t>(*targets, "targets", {job.count});
    }
    return job;
}

nb::list step(Decoder& decoder, const nb::list& jobs) {
    std::vector<Job> built;
    nb::list results;
    for (nb::handle item : jobs) {
        Job job = job_of(item);
        const size_t count = static_cast<size_t>(job.count), vocab = static_cast<size_t>(decoder.shape().vocab_size);
        switch (job.want) {
            case Want::kNone:
                results.append(nb::none());
                break;
            case Want::kLast:
                results.append(new_array(job.out, {vocab}));
                break;
            case Want::kAll:
                results.append(new_array(job.out, {count, vocab}));
                break;
            case Want::kNll:
                results.append(new_array(job.out, {count}));
                break;
        }
        built.push_back(job);
    }
    {
        nb::gil_scoped_release release;
        decoder.step(built);
    }
    return results;
}

// --- Hooks for the tests: the real path of one linear and of the quantizer, without a decoder.

nb::object integer_product(const std::string& layout, const Array& data, int rows, int columns, const Array& x,
                           const std::string& isa) {
    Runner runner(1, isa);
    const auto linear = new_linear(runner, layout, data, rows, columns, 1.0f, "a8", std::nullopt, false, "nothing");
    const int8_t* codes = checked<int8_t>(x, "x", 2);
    const int tokens = static_cast<int>(x.shape(0));
    checked<int8_t>(x, "x", {tokens, columns});
    const ptrdiff_t stride = code_stride(columns), out_stride = round_up(rows, kTileRows);
    AlignedArray<int8_t> padded(static_cast<size_t>(tokens * stride));
    std::vector<int32_t> sums, out(static_cast<size_t>(tokens * out_stride));
    for (int t = 0; t < tokens; ++t) {
        const int8_t* row = codes + static_cast<ptrdiff_t>(t) * columns;
        std::copy(row, row + columns, padded.data() + t * stride);
        sums.push_back(std::accumulate(row, row + columns, 0));
    }
    Linear::Scratch scratch;
    linear->reserve(tokens, 1, scratch);
    const auto& tiles = dynamic_cast<const TileLinear&>(*linear);
    tiles.integer_product({0, rows}, padded.data(), stride, sums.data(), tokens, out.data(), out_stride,
                          scratch.panel.data());
    int32_t* result = nullptr;
    nb::object array = new_array(result, {static_cast<size_t>(tokens), static_cast<size_t>(rows)});
    for (int t = 0; t < tokens; ++t)
        std::copy_n(out.data() + t * out_stride, rows, result + static_cast<ptrdiff_t>(t) * rows);
    return array;
}

/// y = linear(x), x float32 [tokens, columns], with its activation format.
nb::object apply(Runner& runner, const Linear& linear, const Array& x) {
    const int tokens = static_cast<int>(x.ndim() ? x.shape(0) : 0);
    const float* from = checked<float>(x, "x", {tokens, linear.columns()});
    Activations input(tokens, linear.columns());
    input.reserve(linear);
    for (int t = 0; t < tokens; ++t) {
        std::copy_n(from + static_cast<ptrdiff_t>(t) * linear.columns(), linear.columns(), input.row(t));
        input.quantize(t, runner.kernels, {&linear});
    }
    float* out = nullptr;
    nb::object array = new_array(out, {static_cast<size_t>(tokens), static_cast<size_t>(linear.rows())});
    {
        nb::gil_scoped_release release;
        std::vector<Linear::Scratch> scratch(static_cast<size_t>(runner.pool.size()));
        for (Linear::Scratch& s : scratch) linear.reserve(tokens, runner.pool.size(), s);
        runner.pool.run([&](Team& team) {
            linear.apply(linear.share(team), input, tokens, out, linear.rows(), Linear::Write::kStore,
                         scratch[static_cast<size_t>(team.rank)]);
        });
    }
    return array;
}

/// Attention of one layer over a new sequence; q, k, v: float32 [tokens, heads, head_dim].
nb::object attention(const Array& q, const Array& k, const Array& v, const Array& frequencies, int kv_bits, int threads,
                     const std::string& isa) {
    const float* queries = checked<float>(q, "q", 3);
    const int64_t tokens = static_cast<int64_t>(q.shape(0)), head_dim = static_cast<int64_t>(q.shape(2));
    const int64_t kv_heads = k.ndim() == 3 ? static_cast<int64_t>(k.shape(1)) : 0;
    const float* keys = checked<float>(k, "k", {tokens, kv_heads, head_dim});
    const float* values = checked<float>(v, "v", {tokens, kv_heads, head_dim});
    const HeadShape shape{static_cast<int>(q.shape(1)), static_cast<int>(kv_heads), static_cast<int>(head_dim)};
    Runner runner(threads, isa);
    KvPages pages(1, shape.kv_heads, shape.head_dim, kv_bits);
    Attention attention(shape, rotary_of(frequencies, shape.head_dim, 1.0f), pages, runner.kernels, runner.pool.size());
    const int sequence = pages.create();
    pages.reserve(sequence, static_cast<int>(tokens));
    std::vector<Token> step;
    for (int t = 0; t < tokens; ++t) step.push_back({0, &pages.at(sequence), t});
    attention.prepare(step, 1);
    float* out = nullptr;
    nb::object array = new_array(out, {q.shape(0), q.shape(1), q.shape(2)});
    runner.pool.run([&](Team& team) {
        attention.store(team, 0, queries, keys, values);
        team.barrier();
        attention.attend(team, 0, out, shape.heads * shape.head_dim);
    });
    return array;
}

/// Codes [tokens, columns] of float32 [tokens, columns], and their scales, [tokens] or [tokens, strips of 32].
std::pair<nb::object, nb::object> quantize(const Array& x, const std::string& format, const std::string& isa) {
    const float* from = checked<float>(x, "x", 2);
    const int tokens = static_cast<int>(x.shape(0)), columns = static_cast<int>(x.shape(1));
    const ActivationFormat activations = activation_format(format);
    const bool grouped = activations == ActivationFormat::kA8G32;
    Activations input(tokens, columns);
    input.reserve(activations);
    const size_t strips = static_cast<size_t>(input.strip_stride());
    int8_t* codes = nullptr;
    float* scales = nullptr;
    nb::object code_array = new_array(codes, {x.shape(0), x.shape(1)}),
               scale_array = grouped ? new_array(scales, {x.shape(0), strips}) : new_array(scales, {x.shape(0)});
    for (int t = 0; t < tokens && activations != ActivationFormat::kFloat; ++t) {
        std::copy_n(from + static_cast<ptrdiff_t>(t) * columns, columns, input.row(t));
        input.quantize(t, kernels_for(isa), {});
        int8_t* to = codes + static_cast<ptrdiff_t>(t) * columns;
        if (!grouped) {
            std::copy_n(input.codes(activations).codes.data() + t * input.code_stride(), columns, to);
            scales[t] = input.codes(activations).scales[t];
            continue;
        }
        const ActivationStrip* strip = input.strips() + t * input.strip_stride();
        for (int k = 0; k < columns; k += kStripColumns, ++strip) {
            std::copy_n(strip->codes, std::min(columns - k, kStripColumns), to + k);
            *scales++ = strip->scale;
        }
    }
    return {code_array, scale_array};
}

/// Codes [tokens, columns], with the centre taken away, scales [tokens, strips of 32] and shifts [tokens].
nb::object quantize_on_grid(const Array& x, const InputGrid& grid) {
    const float* from = checked<float>(x, "x", 2);
    const int tokens = static_cast<int>(x.shape(0)), columns = static_cast<int>(x.shape(1));
    const int strips = (columns + kStripColumns - 1) / kStripColumns;
    int8_t* codes = nullptr;
    float *scales = nullptr, *shifts = nullptr;
    const nb::object results[] = {new_array(codes, {x.shape(0), x.shape(1)}),
                                  new_array(scales, {x.shape(0), static_cast<size_t>(strips)}),
                                  new_array(shifts, {x.shape(0)})};
    AlignedArray<ActivationStrip> row(static_cast<size_t>(strips));
    for (int t = 0; t < tokens; ++t) {
        shifts[t] = quantize_inputs(grid, from + static_cast<ptrdiff_t>(t) * columns, columns, row.data());
        for (int i = 0; i < strips; ++i) {
            const int begin = i * kStripColumns;
            std::copy_n(row.data()[i].codes, std::min(columns - begin, kStripColumns),
                        codes + static_cast<ptrdiff_t>(t) * columns + begin);
            scales[t * strips + i] = row.data()[i].scale;
        }
    }
    return nb::make_tuple(results[0], results[1], results[2]);
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "The native engine of tritkit. tritkit.engine.native is its face.";
    bind_quantizers(m);
    m.def("available_isas", &available_isas, "Instruction sets with kernels that this CPU can run, slowest first.");
    m.def("default_isa", &default_isa, "TRITKIT_ISA, or the fastest available one.");
    m.def("usable_cores", &usable_cores, "Cores that this process may run on.");
    m.def("runtime_bytes", &runtime_bytes, "runner"_a, "layout"_a, "data"_a, "rows"_a, "cols"_a,
          "activations"_a.none() = nb::none(), "skip"_a = "nothing", "Bytes that a Linear would allocate.");
    m.def("integer_product", &integer_product, "layout"_a, "data"_a, "rows"_a, "cols"_a, "x"_a, "isa"_a = "",
          "Exact int32 [tokens, rows] product of packed weights and int8 x [tokens, cols].");
    m.def("quantize", &quantize, "x"_a, "activations"_a, "isa"_a = "", "int8 codes and float32 scales of each row.");
    m.def("quantize_on_grid", &quantize_on_grid, "x"_a, "grid"_a, "int8 codes, scales of 32 columns, shifts of rows.");
    m.def("apply", &apply, "runner"_a, "linear"_a, "x"_a, "linear(x) for float32 x [tokens, columns].");

    m.def("attention", &attention, "q"_a, "k"_a, "v"_a, "inverse_frequencies"_a, "kv_bits"_a, "threads"_a = 0,
          "isa"_a = "", "Causal attention of one layer with rotary embedding; float32 [tokens, heads, head_dim].");

    nb::class_<Runner>(m, "Runner", "Threads and kernels.")
        .def(nb::init<int, const std::string&, const std::string&>(), "threads"_a = 0, "isa"_a = "", "layout"_a = "")
        .def_prop_ro("threads", [](const Runner& r) { return r.pool.size(); })
        .def_prop_ro("isa", [](const Runner& r) { return r.kernels.isa; })
        .def_prop_ro("tiles", [](const Runner& r) { return facts(tile_layout(r.ternary.tiles)).name; });

    m.def("integer_peak", &integer_peak, "runner"_a, "seconds"_a, Release(),
          "Gop/s of each thread, while all of them multiply codes in registers for about so long.");
    nb::class_<MemoryReader>(m, "MemoryReader", "A buffer of so many bytes, to be read from memory.")
        .def(nb::init<std::shared_ptr<Runner>, size_t>(), "runner"_a, "bytes"_a, Release())
        .def("read", &MemoryReader::pass, "streams"_a, "ahead"_a, Release(), "GB/s of one pass over the buffer.");

    m.def(
        "product_seconds",
        [](Runner& runner, const std::vector<std::shared_ptr<Linear>>& linears, int tokens, int passes) {
            return product_seconds(runner, {linears.begin(), linears.end()}, tokens, passes);
        },
        "runner"_a, "linears"_a, "tokens"_a, "passes"_a, Release(),
        "Seconds of one product, for each pass over linears of one shape.");

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

    nb::class_<Decoder>(m, "Decoder", "The whole forward step.")
        .def("__init__", &init_decoder, "runner"_a, "shape"_a, "embedding"_a, "layers"_a, "final_norm"_a, "head"_a,
             "kv_bits"_a = 16, "density"_a.none() = nb::none())
        .def("new", &Decoder::create, Release())
        .def("fork", &Decoder::fork, "sequence"_a, Release())
        .def("truncate", &Decoder::truncate, "sequence"_a, "length"_a, Release())
        .def("free", &Decoder::free, "sequence"_a, Release())
        .def("length", &Decoder::length, "sequence"_a, Release())
        .def("step", &step, "jobs"_a, "List of (sequence, int32 tokens, want, int32 targets or None).")
        .def_prop_ro("bytes_per_token", &Decoder::bytes_per_token)
        .def_prop_ro("ffn_bytes_per_token", &Decoder::ffn_bytes_per_token)
        .def_prop_ro("ffn_bytes", &Decoder::ffn_bytes)
        .def_prop_ro("density", [](const Decoder& d) { return std::pair(d.density().up, d.density().down); })
        .def_prop_ro("kv_bits", &Decoder::kv_bits)
        .def_prop_ro("kv_bytes_per_position", &Decoder::kv_bytes_per_position);

    nb::class_<Sampler>(m, "Sampler", "Draws tokens from logits.")
        .def(
            "__init__",
            [](Sampler* self, float temperature, int top_k, double top_p, double min_p, float repetition_penalty,
               uint64_t seed) {
                new (self) Sampler(SamplingOptions{temperature, top_k, top_p, min_p, repetition_penalty}, seed);
            },
            "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "repetition_penalty"_a, "seed"_a)
        .def("sample",
             [](Sampler& self, const Array& logits, const Array& history) {
                 const float* values = checked<float>(logits, "logits", 1);
                 const int32_t* tokens = checked<int32_t>(history, "history", 1);
                 return self.sample(values, static_cast<int>(logits.shape(0)), tokens,
                                    static_cast<int>(history.shape(0)));
             })
        .def("distribution", [](Sampler& self, const Array& logits, const Array& history) {
            const float* values = checked<float>(logits, "logits", 1);
            const int32_t* tokens = checked<int32_t>(history, "history", 1);
            return self.distribution(values, static_cast<int>(logits.shape(0)), tokens,
                                     static_cast<int>(history.shape(0)));
        });
}

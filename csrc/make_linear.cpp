// Which class of linear, and which run-time layout, fits a matrix of a file.
#include <stdexcept>

#include "group_sources.h"
#include "grouped.h"
#include "lines.h"

namespace tritkit {
namespace {

Runtime runtime_of(const Stored& source, TernaryLayout ternary) {
    return source.layout.runtime == Runtime::kTernary ? ternary.tiles : source.layout.runtime;
}

/// Whether blocks run as such; the ternary ones may also run as a matrix with one scale.
bool runs_in_groups(const SourceLayout& layout, const std::string& activations) {
    const bool groups = activations == "a8_g32" && layout.blocks;
    if (layout.runtime == Runtime::kGroups && !groups)
        throw std::invalid_argument("activations is " + (activations.empty() ? "None" : "'" + activations + "'") +
                                    " for layout " + layout.name + ", expected a8_g32");
    return groups;
}

/// Lines of which more than an eighth is padding would cost more, where nothing is skipped, than they bring elsewhere.
bool fits_lines(const Stored& source, TernaryLayout ternary, Skip skip) {
    if (source.layout.runtime != Runtime::kTernary || skip == Skip::kNothing) return false;
    const int entries = skip == Skip::kInputs ? source.rows : source.columns;
    const int padding = lines_of(entries) * kLineEntries - entries;
    return ternary.lines == Lines::kAlways || (ternary.lines == Lines::kWhereFull && padding <= entries / 8);
}

}  // namespace

std::shared_ptr<Linear> make_linear(const Stored& source, TernaryLayout ternary, Skip skip, float scale,
                                    const std::string& activations, const float* bias, Pool& pool, Arena& arena,
                                    const Kernels& kernels) {
    if (runs_in_groups(source.layout, activations))
        return std::make_shared<GroupedLinear>(BlockSource(source), scale, bias, pool, arena, kernels);
    if (fits_lines(source, ternary, skip)) {
        if (skip == Skip::kOutputs)
            return std::make_shared<RowLinear>(source, scale, activations, bias, pool, arena, kernels);
        return std::make_shared<ColumnLinear>(source, scale, activations, bias, pool, arena, kernels);
    }
    if (!is_float(source.layout.runtime))
        return std::make_shared<TileLinear>(source, runtime_of(source, ternary), scale, activations, bias, pool, arena,
                                            kernels);
    if (!activations.empty())
        throw std::invalid_argument("activations is '" + activations + "' for layout " + source.layout.name +
                                    ", expected None");
    return std::make_shared<FloatLinear>(source, scale, bias, pool, arena, kernels);
}

int64_t needed_bytes(const Stored& source, TernaryLayout ternary, Skip skip, const std::string& activations) {
    if (runs_in_groups(source.layout, activations))
        return GroupedLinear::needed_bytes(source.rows, group_layout(*source.layout.blocks, source.columns));
    if (fits_lines(source, ternary, skip)) {
        const bool columns = skip == Skip::kInputs;
        return int64_t{columns ? source.columns : source.rows} * lines_of(columns ? source.rows : source.columns) *
               kBlockBytes;
    }
    if (runs_in_place(source.layout, source.bytes.data(), source.columns)) return 0;
    const int64_t tiles = (source.rows + kTileRows - 1) / kTileRows;
    return tiles * tile_bytes(runtime_of(source, ternary), source.columns);
}

}  // namespace tritkit

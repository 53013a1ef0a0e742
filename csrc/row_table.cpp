#include "row_table.h"

#include <algorithm>
#include <stdexcept>

#include "floats.h"

namespace tritkit {
namespace {

constexpr size_t kLargestTouched = size_t{16} << 20;
constexpr size_t kFaultAround = size_t{1} << 20;  // measured: so much may be mapped with a row that is read

}  // namespace

RowTable::RowTable(const Stored& source, float scale)
    : source_(source), scale_(scale), row_bytes_(static_cast<size_t>(source.layout.source_bytes(1, source.columns))) {
    const SourceLayout& layout = source.layout;
    if (!is_float(layout.runtime) && !layout.blocks)
        throw std::invalid_argument(std::string("rows of layout ") + layout.name + " cannot be looked up");
}

void RowTable::copy_columns(int r, int begin, int count, float* out) const {
    const SourceLayout& layout = source_.layout;
    const uint8_t* from = source_.bytes.data() + static_cast<size_t>(r) * row_bytes_ +
                          begin / layout.block_columns * static_cast<ptrdiff_t>(layout.block_bytes);
    auto each = [&](auto value) {
        for (int k = 0; k < count; ++k) out[k] = value(static_cast<size_t>(k)) * scale_;
    };
    auto bits = [&](size_t k) {
        uint16_t found;
        std::memcpy(&found, from + 2 * k, 2);
        return found;
    };
    switch (layout.runtime) {
        case Runtime::kBf16:
            return each([&](size_t k) { return float_from_bf16(bits(k)); });
        case Runtime::kF16:
            return each([&](size_t k) { return float_from_f16(bits(k)); });
        case Runtime::kF32:
            return each([&](size_t k) {
                float found;
                std::memcpy(&found, from + 4 * k, 4);
                return found;
            });
        default:
            Block block{};
            for (int k = 0; k < count; k += layout.block_columns, from += layout.block_bytes) {
                layout.blocks->unpack(from, block);
                dequantize(*layout.blocks, block, out + k);
            }
            for (int k = 0; k < count; ++k) out[k] *= scale_;
    }
}

void RowTable::looked_up(int rows, bool scattered) const {
    const size_t bytes =
        std::min(static_cast<size_t>(rows) * (row_bytes_ + (scattered ? kFaultAround : 0)), source_.bytes.size());
    if (!source_.mapped || touched_.fetch_add(bytes) < kLargestTouched) return;
    touched_ = 0;
    drop_file_pages(source_.bytes.data(), source_.bytes.size());
}

}  // namespace tritkit

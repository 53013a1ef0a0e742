#include "row_table.h"

#include <algorithm>
#include <stdexcept>

#include "floats.h"

namespace tritkit {
namespace {

constexpr size_t kLargestTouched = size_t{16} << 20;
constexpr size_t kFaultAround = size_t{1} << 20;  // measured: so much may be mapped with a row that is read

}  // namespace

StoredRows::StoredRows(const Stored& source, float scale)
    : RowTable(source.rows, source.columns),
      source_(source),
      scale_(scale),
      row_bytes_(static_cast<size_t>(source.layout.source_bytes(1, source.columns))) {
    const SourceLayout& layout = source.layout;
    if (!is_float(layout.runtime) && !layout.blocks)
        throw std::invalid_argument(std::string("rows of layout ") + layout.name + " cannot be looked up");
}

void StoredRows::copy_columns(int r, int begin, int count, float* out) const {
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

void StoredRows::looked_up(int rows, bool scattered) const {
    const size_t bytes =
        std::min(static_cast<size_t>(rows) * (row_bytes_ + (scattered ? kFaultAround : 0)), source_.bytes.size());
    if (!source_.mapped || touched_.fetch_add(bytes) < kLargestTouched) return;
    touched_ = 0;
    drop_file_pages(source_.bytes.data(), source_.bytes.size());
}

GroupRows::GroupRows(const GroupArrays& arrays, std::vector<Bytes> owners, float scale)
    : RowTable(arrays.rows, arrays.columns), s_(arrays), owners_(std::move(owners)), scale_(scale) {
    const bool plain = s_.offset_form == GroupOffsets::kNone || s_.offset_form == GroupOffsets::kZeros;
    if (s_.d || !plain) throw std::invalid_argument("rows whose scales have two levels or offsets cannot be looked up");
}

size_t GroupRows::row_bytes() const {
    const int groups = (s_.columns + s_.group - 1) / s_.group;
    const int of_group = (s_.scale_form == GroupScales::kHalf ? 2 : 4) + (s_.offset_form == GroupOffsets::kZeros);
    return static_cast<size_t>(s_.row_bytes()) + static_cast<size_t>(groups) * static_cast<size_t>(of_group);
}

void GroupRows::copy_columns(int r, int begin, int count, float* out) const {
    const ptrdiff_t groups = (s_.columns + s_.group - 1) / s_.group, row = r;
    uint8_t codes[kSpanColumns];
    for (int done = 0; done < count; done += kSpanColumns) {
        const int some = std::min(count - done, kSpanColumns);
        read_fields(s_.codes + row * s_.row_bytes(), s_.row_bytes(), s_.field_bits, begin + done, some, codes);
        for (int k = 0; k < some; ++k) {
            const ptrdiff_t at = row * groups + (begin + done + k) / s_.group;
            const float scale = s_.scale_form == GroupScales::kHalf
                                    ? float_from_f16(static_cast<const uint16_t*>(s_.scales)[at])
                                    : static_cast<const float*>(s_.scales)[at];
            float value = scale;
            if (s_.table)
                value *= static_cast<float>(s_.table[codes[k]]);
            else if (s_.offset_form == GroupOffsets::kZeros)
                value = scale * static_cast<float>(codes[k]) -
                        scale * static_cast<float>(static_cast<const uint8_t*>(s_.offsets)[at]);
            else
                value *= static_cast<float>(codes[k] - (1 << (s_.bits - 1)));
            out[done + k] = value * scale_;
        }
    }
}

}  // namespace tritkit

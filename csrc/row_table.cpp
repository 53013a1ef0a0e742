#include "row_table.h"

#include <algorithm>
#include <stdexcept>

#include "floats.h"

namespace tritkit {
namespace {

constexpr size_t kLargestTouched = size_t{16} << 20;
constexpr size_t kFaultAround = size_t{1} << 20;  // measured: so much may be mapped with a row that is read

}  // namespace

RowTable::RowTable(Runtime layout, Bytes data, int rows, int columns, float scale, bool drop_pages)
    : layout_(layout),
      data_(std::move(data)),
      rows_(rows),
      columns_(columns),
      scale_(scale),
      drop_pages_(drop_pages),
      row_bytes_(static_cast<size_t>(columns) * static_cast<size_t>(float_bytes(layout))) {
    if (data_.size() != row_bytes_ * static_cast<size_t>(rows))
        throw std::invalid_argument("the rows have " + std::to_string(data_.size()) + " bytes, expected " +
                                    std::to_string(row_bytes_ * static_cast<size_t>(rows)));
}

void RowTable::copy_row(int r, float* out) const {
    const uint8_t* from = data_.data() + static_cast<size_t>(r) * row_bytes_;
    auto each = [&](auto value) {
        for (int k = 0; k < columns_; ++k) out[k] = value(static_cast<size_t>(k)) * scale_;
    };
    auto bits = [&](size_t k) {
        uint16_t found;
        std::memcpy(&found, from + 2 * k, 2);
        return found;
    };
    if (layout_ == Runtime::kBf16)
        each([&](size_t k) { return float_from_bf16(bits(k)); });
    else if (layout_ == Runtime::kF16)
        each([&](size_t k) { return float_from_f16(bits(k)); });
    else
        each([&](size_t k) {
            float found;
            std::memcpy(&found, from + 4 * k, 4);
            return found;
        });
}

void RowTable::looked_up(int rows, bool scattered) const {
    const size_t bytes =
        std::min(static_cast<size_t>(rows) * (row_bytes_ + (scattered ? kFaultAround : 0)), data_.size());
    if (!drop_pages_ || touched_.fetch_add(bytes) < kLargestTouched) return;
    touched_ = 0;
    drop_file_pages(data_.data(), data_.size());
}

}  // namespace tritkit

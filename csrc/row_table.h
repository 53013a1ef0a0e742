// Rows of floats where they lie, in a mapped file or an array, looked up one at a time: an embedding.
#pragma once

#include <atomic>

#include "memory.h"
#include "repack.h"

namespace tritkit {

class RowTable {
 public:
    /// data: rows of a float layout, on any boundary. drop_pages: they lie in a read-only mapping of a file that nobody
    /// else reads all the time, so the pages of rows that were looked up may leave this process now and then.
    RowTable(Runtime layout, Bytes data, int rows, int columns, float scale, bool drop_pages);

    int rows() const { return rows_; }
    int columns() const { return columns_; }
    size_t row_bytes() const { return row_bytes_; }

    /// Row r times the scale. Any number of threads at once.
    void copy_row(int r, float* out) const;
    /// So many rows were read, here and there or one behind the other: their pages may leave now and then.
    void looked_up(int rows, bool scattered) const;

 private:
    Runtime layout_;
    Bytes data_;
    int rows_, columns_;
    float scale_;
    bool drop_pages_;
    size_t row_bytes_;
    mutable std::atomic<size_t> touched_{0};  // bytes that lookups have brought in since the pages were last dropped
};

using RowsPtr = std::shared_ptr<const RowTable>;

}  // namespace tritkit

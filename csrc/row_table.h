// Rows of floats, or of blocks that stand for floats, where they lie in a mapped file or an array, looked up one at a
// time: an embedding.
#pragma once

#include <atomic>

#include "memory.h"
#include "repack.h"

namespace tritkit {

class RowTable {
 public:
    /// source: floats on any boundary, or blocks; its `mapped` says that they lie in a read-only mapping of a file that
    /// nobody else reads all the time, so that the pages of rows that were looked up may leave this process now and
    /// then. Throws std::invalid_argument.
    RowTable(const Stored& source, float scale);

    int rows() const { return source_.rows; }
    int columns() const { return source_.columns; }
    size_t row_bytes() const { return row_bytes_; }

    /// Row r times the scale. Any number of threads at once.
    void copy_row(int r, float* out) const { copy_columns(r, 0, columns(), out); }
    /// The same for `count` columns; they begin and end where blocks do.
    void copy_columns(int r, int begin, int count, float* out) const;
    /// So many rows were read, here and there or one behind the other: their pages may leave now and then.
    void looked_up(int rows, bool scattered) const;

 private:
    Stored source_;
    float scale_;
    size_t row_bytes_;
    mutable std::atomic<size_t> touched_{0};  // bytes that lookups have brought in since the pages were last dropped
};

using RowsPtr = std::shared_ptr<const RowTable>;

}  // namespace tritkit

// Rows of numbers looked up one at a time, in the bits in which they lie in a mapped file or an array: an embedding.
#pragma once

#include <atomic>
#include <vector>

#include "group_sources.h"
#include "memory.h"
#include "repack.h"

namespace tritkit {

class RowTable {
 public:
    virtual ~RowTable() = default;

    int rows() const { return rows_; }
    int columns() const { return columns_; }
    virtual size_t row_bytes() const = 0;

    /// Row r times the scale. Any number of threads at once.
    void copy_row(int r, float* out) const { copy_columns(r, 0, columns(), out); }
    /// The same for `count` columns; they begin and end where blocks do.
    virtual void copy_columns(int r, int begin, int count, float* out) const = 0;
    /// So many rows were read, here and there or one behind the other: their pages may leave now and then.
    virtual void looked_up(int, bool) const {}

 protected:
    RowTable(int rows, int columns) : rows_(rows), columns_(columns) {}

 private:
    int rows_, columns_;
};

using RowsPtr = std::shared_ptr<const RowTable>;

/// Floats, or blocks that stand for floats.
class StoredRows : public RowTable {
 public:
    /// source: floats on any boundary, or blocks; its `mapped` says that they lie in a read-only mapping of a file that
    /// nobody else reads all the time, so that the pages of rows that were looked up may leave this process now and
    /// then. Throws std::invalid_argument.
    StoredRows(const Stored& source, float scale);

    size_t row_bytes() const override { return row_bytes_; }
    void copy_columns(int r, int begin, int count, float* out) const override;
    void looked_up(int rows, bool scattered) const override;

 private:
    Stored source_;
    float scale_;
    size_t row_bytes_;
    mutable std::atomic<size_t> touched_{0};  // bytes that lookups have brought in since the pages were last dropped
};

/// Codes with scales for groups of columns, of one level.
class GroupRows : public RowTable {
 public:
    /// owners: what keeps the arrays alive. Throws std::invalid_argument.
    GroupRows(const GroupArrays& arrays, std::vector<Bytes> owners, float scale);

    size_t row_bytes() const override;
    void copy_columns(int r, int begin, int count, float* out) const override;

 private:
    GroupArrays s_;
    std::vector<Bytes> owners_;
    float scale_;
};

}  // namespace tritkit

// Where the weights of a GroupedLinear come from: arrays of codes and scales, or the blocks of ggml.
#pragma once

#include <functional>
#include <string>

#include "ggml_blocks.h"
#include "kernels.h"
#include "repack.h"
#include "threads.h"

namespace tritkit {

/// The codes of a span in the order that all T16 layouts share: byte 4r+j of quad q is row r, column 4q+j.
struct SpanCodes {
    uint8_t quads[kSpanColumns / 4][kBlockBytes];
};

/// A matrix that is re-ordered into the run-time layout (group_layout.h), one span of a tile at a time.
class GroupSource {
 public:
    virtual ~GroupSource() = default;

    int rows() const { return rows_; }
    int columns() const { return columns_; }
    const GroupLayout& layout() const { return layout_; }
    /// A code stands for code - 2^bias_bits; -1: for itself.
    int bias_bits() const { return bias_bits_; }
    /// As in GroupProduct; nothing where there is none.
    virtual void copy_table(uint8_t (&)[32]) const {}

    /// Columns begin .. end - 1 of a tile: their header, and their codes, both zero before. False if there is something
    /// that the layout cannot hold, which fault() names. Any number of threads at once.
    virtual bool read_span(int tile, int begin, int end, uint8_t* header, SpanCodes& codes) const = 0;
    virtual std::string fault() const = 0;

    /// Runs move(tile) for all tiles, by all threads.
    virtual void for_each_tile(Pool& pool, int tiles, const std::function<void(int tile)>& move) const;

 protected:
    GroupSource(int rows, int columns, const GroupLayout& layout, int bias_bits)
        : rows_(rows), columns_(columns), layout_(layout), bias_bits_(bias_bits) {}

    int rows_, columns_;
    GroupLayout layout_;
    int bias_bits_;
};

/// `count` fields of so many bits from field `begin` on; `bytes` have an end, beyond which nothing is read.
void read_fields(const uint8_t* bytes, ptrdiff_t end, int bits, int begin, int count, uint8_t* out);

/// A matrix one number at a time. groups = ceil(columns / group), spans = ceil(columns / 256).
struct GroupArrays {
    int rows, columns;
    int bits;   // of a code, 2 .. 8
    int group;  // columns that share a scale: a multiple of 16, or at least all columns; a row's last may have fewer
    GroupScales scale_form;
    GroupOffsets offset_form;  // kNone and no table: a code stands for code - 2^(bits - 1)
    const uint8_t* codes;      // [rows, row_bytes]: fields of so many bits, lowest first along a row
    int field_bits;            // 1 .. 8; 8: a byte for each code
    ptrdiff_t row_bytes() const { return (ptrdiff_t{columns} * field_bits + 7) / 8; }
    const void* scales;    // [rows, groups]: float16, float or, times d, int8
    const uint16_t* d;     // [rows, spans], float16
    const void* offsets;   // [rows, groups]: float16, float or uint8
    const uint16_t* dmin;  // [rows, spans], float16
    const int16_t* table;  // null or [16]
};

class ArraySource : public GroupSource {
 public:
    /// Throws std::invalid_argument.
    explicit ArraySource(const GroupArrays& arrays);

    void copy_table(uint8_t (&table)[32]) const override;
    bool read_span(int tile, int begin, int end, uint8_t* header, SpanCodes& codes) const override;
    std::string fault() const override;

 private:
    void read_header(int tile, int begin, int end, uint8_t* out) const;

    GroupArrays s_;
};

class BlockSource : public GroupSource {
 public:
    /// stored.layout has blocks.
    explicit BlockSource(const Stored& stored);

    bool read_span(int tile, int begin, int end, uint8_t* header, SpanCodes& codes) const override;
    std::string fault() const override;
    /// Pages of a mapped file are dropped behind the work.
    void for_each_tile(Pool& pool, int tiles, const std::function<void(int tile)>& move) const override;

 private:
    Stored stored_;
    const BlockType& type_;
};

}  // namespace tritkit

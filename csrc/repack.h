// From the bytes of a file to the bytes that the kernels read. Done once, at load, by all threads.
//
// In two steps that know nothing of each other. A layout of a file unpacks a tile of 16 rows to codes, one byte each;
// a run-time layout packs that tile. The codes lie in the order that all T16 layouts share, 16 rows by 4 columns in 64
// bytes: byte 4r+j of group g is the code of row r, column 4g+j. So to pack is to combine whole groups.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "ggml_blocks.h"
#include "kernels.h"
#include "memory.h"
#include "threads.h"

namespace tritkit {

/// T16-2, T16-3 (ternary), T16-1 (binary), T16-4, T16-8 (integers with one scale for each row), groups of columns with
/// scales of their own (group_layout.h), padded rows of floats.
enum class Runtime { kTernary, kTernary3, kBinary, kInt4, kInt8, kGroups, kF32, kF16, kBf16 };

inline bool is_float(Runtime layout) { return layout >= Runtime::kF32; }

struct SourceLayout;

/// Some columns of some tiles of a matrix in a file.
struct SourcePart {
    const SourceLayout& layout;
    const uint8_t* source;  // of the whole matrix
    int rows, columns;
    uint16_t scale;     // of the matrix, as float16
    int tile;           // the first one; the others follow as tiles_together says
    int begin, count;   // columns; the count may go beyond the last one
    ptrdiff_t spacing;  // bytes from the codes of a tile to those of the next
};

// The codes of a panel stay in the first cache: so many columns of four tiles, or four times as many of one tile. Both
// are a multiple of the columns of every block that they meet, and of every line.
constexpr int kPanelColumns = 320;
constexpr int panel_columns(int together) { return 4 * kPanelColumns / together; }

/// A layout of a file: how many bytes a matrix has there, and how they become codes.
struct SourceLayout {
    const char* name;
    Runtime runtime;  // that fits every machine
    // So many bytes hold so many columns of so many rows.
    int block_bytes, block_columns, block_rows;
    bool padded;  // the last columns of a row may not fill their block
    /// How many tiles share their bytes and are unpacked together: tiles t, t + n, t + 2n ... with n = tiles / this.
    int (*tiles_together)(int rows);
    /// Writes what exists of the part over codes that mean nothing. False if it holds what `fault` says. Null for
    /// floats, which are copied, and for blocks that hold more than ternary codes.
    bool (*unpack)(const SourcePart& part, uint8_t* codes);
    const char* fault;
    const BlockType* blocks;  // null: it has none

    int64_t source_bytes(int rows, int columns) const;
};

/// Throws std::invalid_argument with the known names.
const SourceLayout& source_layout(const std::string& name);

/// How the tiles of a run-time layout look to the kernels. Not for floats.
TileLayout tile_layout(Runtime layout);

/// Blocks of a tile from its codes, which lie as above.
void pack_codes(TileLayout layout, const uint8_t* codes, int blocks, uint8_t* out);

/// Bytes of one tile in the run-time layout.
int64_t tile_bytes(Runtime layout, int columns);

/// Bytes of an element of a float layout.
inline int float_bytes(Runtime layout) { return layout == Runtime::kF32 ? 4 : 2; }

/// A matrix as it lies in a file.
struct Stored {
    const SourceLayout& layout;
    Bytes bytes;  // source_bytes of it
    int rows, columns;
    bool mapped = false;  // a read-only mapping of a file: its pages are dropped behind the work
};

/// Runs move(rank, item) for items 0 ... items - 1, which lie in that order in the source, by all threads.
void move_all(const Stored& source, int items, Pool& pool, const std::function<void(int rank, int item)>& move);

/// Whether the kernels can read these floats where they lie.
bool runs_in_place(const SourceLayout& layout, const void* data, int columns);

/// The matrix in the run-time layout. Throws std::invalid_argument on codes out of range, on blocks that have another
/// scale than `scale`, and where the run-time layout cannot hold the codes of the source.
Bytes repack(const Stored& source, Runtime runtime, float scale, Pool& pool, Arena& arena);

}  // namespace tritkit

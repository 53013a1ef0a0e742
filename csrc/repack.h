// From the bytes of a file to the bytes that the kernels read. Done once, at load, by all threads.
#pragma once

#include <cstdint>
#include <string>

#include "memory.h"
#include "threads.h"

namespace tritkit {

enum class Runtime { kTernary, kBinary, kF32, kF16, kBf16 };  // T16-2, T16-1, padded rows of floats

inline bool is_float(Runtime layout) { return layout >= Runtime::kF32; }

/// A layout of a file: how many bytes a matrix has there, and how a tile (16 rows) of it is moved.
struct SourceLayout {
    const char* name;
    Runtime runtime;
    int64_t (*source_bytes)(int rows, int columns);
    /// Writes rows 16 * tile ... into a zeroed tile. False if the source holds a code that the format does not have.
    bool (*move_tile)(const uint8_t* source, int rows, int columns, int tile, uint8_t* out);
};

/// Throws std::invalid_argument with the known names.
const SourceLayout& source_layout(const std::string& name);

/// Bytes of one tile in the run-time layout.
int64_t tile_bytes(Runtime layout, int columns);

/// `source` must hold source_bytes(rows, columns) bytes. Throws std::invalid_argument on codes out of range.
AlignedArray<uint8_t> repack(const SourceLayout& layout, const void* source, int rows, int columns, Pool& pool);

}  // namespace tritkit

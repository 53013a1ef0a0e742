// Rounding rows of floats to the block types of ggml (ggml_blocks.h), byte for byte as ggml's own quantisers do it.
//
// Without importance the weights of a search are made from the values themselves; with it, from the importance of each
// column, which is the mean square of what that column is multiplied with (llama.cpp's importance matrix).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "ggml_blocks.h"
#include "threads.h"

namespace tritkit::ggml {

/// Bytes of one row of `columns` finite values, whole blocks. importance: [columns], or null.
using QuantizeRow = void (*)(const float* x, const float* importance, int columns, uint8_t* out);

struct Quantizer {
    const char* name;
    QuantizeRow row;
};

const std::vector<Quantizer>& quantizers();

/// Of that type, or null.
const BlockType* find_block_type(const std::string& name);

/// x: [rows, columns]; out: the bytes of the rows. The result does not depend on the threads.
void quantize_rows(const Quantizer& quantizer, const float* x, const float* importance, int rows, int columns,
                   uint8_t* out, Pool& pool);

// The rows of `quantizers`, in ggml_quantize_small.cpp and ggml_quantize_k.cpp.
void quantize_q4_0(const float* x, const float* importance, int columns, uint8_t* out);
void quantize_q4_1(const float* x, const float* importance, int columns, uint8_t* out);
void quantize_q5_0(const float* x, const float* importance, int columns, uint8_t* out);
void quantize_q5_1(const float* x, const float* importance, int columns, uint8_t* out);
void quantize_q8_0(const float* x, const float* importance, int columns, uint8_t* out);
void quantize_q2_k(const float* x, const float* importance, int columns, uint8_t* out);
void quantize_q3_k(const float* x, const float* importance, int columns, uint8_t* out);
void quantize_q4_k(const float* x, const float* importance, int columns, uint8_t* out);
void quantize_q5_k(const float* x, const float* importance, int columns, uint8_t* out);
void quantize_q6_k(const float* x, const float* importance, int columns, uint8_t* out);
void quantize_tq1_0(const float* x, const float* importance, int columns, uint8_t* out);
void quantize_tq2_0(const float* x, const float* importance, int columns, uint8_t* out);

}  // namespace tritkit::ggml

// The whole forward step of a decoder of the llama, qwen and bitnet families: tokens in, logits out, in one call.
//
// RMSNorm; q, k, v with grouped heads; rotary embedding; causal attention; gated MLP with silu or relu^2; optional
// norms of each query and key head, before the o and down projections, and in front of any single linear; an output
// head that may be the embedding itself. All float32 but for the linears, each of which carries its own number format.
#pragma once

#include <initializer_list>
#include <memory>
#include <mutex>
#include <vector>

#include "attention.h"
#include "head.h"
#include "kernels.h"
#include "kv_pages.h"
#include "linear.h"
#include "row_table.h"
#include "sparse_ffn.h"
#include "threads.h"

namespace tritkit {

/// The threads, the memory and the kernels that everything of one engine uses.
struct Runner {
    /// ternary: "t16_2", "t16_3", "l64_3" (lines where something may be skipped) or "", the fastest. Throws
    /// std::invalid_argument.
    Runner(int threads, const std::string& isa, const std::string& ternary = "");
    Pool pool;
    Arena arena;
    const Kernels& kernels;
    TernaryLayout ternary;
};

enum class Gate { kSilu, kRelu2 };
Gate gate_activation(const std::string& name);  // "silu", "relu2"; throws std::invalid_argument

struct DecoderShape {
    int vocab_size, hidden_size, intermediate_size;
    HeadShape heads;
    Rotary rotary;
    float rms_norm_eps;
    Gate activation;
    int context_length;
    float linear_norm_eps = 0.0f;  // of OwnNorms
};

using Norm = std::vector<float>;  // empty: none

/// Norms that a linear has for itself: its input passes through, and nobody else sees it.
struct OwnNorms {
    Norm q, k, v, o, gate, up, down;
};

struct Layer {
    LinearPtr q, k, v, o, gate, up, down;
    Norm input_norm, post_attention_norm, attn_sub_norm, ffn_sub_norm;
    Norm q_norm, k_norm;  // of each head
    OwnNorms own;
    LinearPtr adapter;  // null, or a linear whose output of the layer's input is added to the layer's output
};

enum class Want { kNone, kLast, kAll, kNll };

/// Tokens to append to a sequence, and what to say about them.
struct Job {
    int sequence;
    const int32_t* tokens;
    int count;
    Want want;
    const int32_t* targets;  // kNll: [count], -1 for none
    float* out;              // kLast: [vocab]; kAll: [count, vocab]; kNll: [count]
};

class Decoder {
 public:
    Decoder(std::shared_ptr<Runner> runner, const DecoderShape& shape, RowsPtr embedding, std::vector<Layer> layers,
            Norm final_norm, HeadPtr head, int kv_bits, const Density* forced = nullptr);

    int create();
    int fork(int sequence);
    void truncate(int sequence, int length);
    void free(int sequence);
    int length(int sequence) const;

    /// All jobs together, as one batch. Throws std::invalid_argument, and then nothing has happened.
    void step(const std::vector<Job>& jobs);

    const DecoderShape& shape() const { return shape_; }
    /// Bytes of weights that one decoded token reads, on average since the beginning; of those, gate, up and down.
    double bytes_per_token() const;
    double ffn_bytes_per_token() const;
    /// What they would be if nothing was skipped.
    size_t ffn_bytes() const;
    /// Shares that were read of up's rows and of down's columns.
    Density density() const { return sparse_ffn_.density(); }
    /// Bytes of keys and values that one position of a sequence takes, and that each later token reads.
    double kv_bytes_per_position() const { return pages_.bytes_per_position(); }
    int kv_bits() const { return pages_.layout().bits; }

 private:
    struct Workspace;
    struct Output;

    void require_valid(const std::vector<Job>& jobs) const;
    std::vector<Token> place(const std::vector<Job>& jobs);
    Workspace& workspace(int tokens);
    void run_layer(Team& team, int layer, int tokens, Workspace& w);
    bool is_sparse(const Layer& layer) const;
    void run_ffn(Team& team, int layer, int tokens, Workspace& w);
    void norm(const float* x, const Norm& weight, float* out) const;
    void norm_in_place(float* x, const Norm& sub_norm, const Norm& own_norm) const;
    struct Reader {
        const Norm* own_norm;
        const Linear* linear;
    };
    void quantize_inputs(int token, std::initializer_list<Reader> readers, Workspace& w) const;
    /// -log softmax(logits)[target]; 0 for the target -1.
    float negative_log_likelihood(const float* logits, int target) const;
    void run_head(Team& team, const std::vector<Output>& outputs, Workspace& w) const;

    std::shared_ptr<Runner> runner_;
    DecoderShape shape_;
    RowsPtr embedding_;
    std::vector<Layer> layers_;
    Norm final_norm_;
    HeadPtr head_;
    KvPages pages_;
    Attention attention_;
    SparseFfn sparse_ffn_;
    std::shared_ptr<Workspace> workspace_;
    mutable ForkSafeMutex mutex_;  // one call at a time
};

}  // namespace tritkit

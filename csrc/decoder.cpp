#include "decoder.h"

#include <algorithm>
#include <set>
#include <stdexcept>
#include <string>

namespace tritkit {
namespace {

TernaryLayout ternary_layout(const std::string& name, const Kernels& kernels) {
    const Runtime faster = kernels.base3 ? Runtime::kTernary3 : Runtime::kTernary;
    if (name.empty()) return {faster, kernels.lines->faster ? Lines::kWhereFull : Lines::kNever};
    if (name == "l64_3") return {faster, Lines::kAlways};
    if (name == "t16_2") return {Runtime::kTernary, Lines::kNever};
    if (name == "t16_3") return {Runtime::kTernary3, Lines::kNever};
    throw std::invalid_argument("layout is '" + name + "', expected t16_2, t16_3, l64_3 or None");
}

constexpr int kHeadTokens = 16;  // tokens whose logits exist at the same time

/// out[t] = (or +=) linear(x[t]) for n tokens, the rows shared by all threads.
void deal_out(Team& team, const Linear& linear, const Activations& x, int n, float* out, Linear::Write write,
              Linear::Scratch& scratch) {
    Chunks chunks(team, linear.rows(), linear.rows_together());
    for (Range rows = chunks.next(); !rows.empty(); rows = chunks.next())
        linear.apply(rows, x, n, out, linear.rows(), write, scratch);
}

}  // namespace

Runner::Runner(int threads, const std::string& isa, const std::string& layout)
    : pool(threads), kernels(kernels_for(isa)), ternary(ternary_layout(layout, kernels)) {}

Gate gate_activation(const std::string& name) {
    if (name == "silu") return Gate::kSilu;
    if (name == "relu2") return Gate::kRelu2;
    throw std::invalid_argument("activation is '" + name + "', expected silu or relu2");
}

/// Everything between the linears, for up to `capacity` tokens.
struct Decoder::Workspace {
    Workspace(int capacity, const Decoder& d)
        : capacity(capacity),
          hidden(static_cast<size_t>(capacity) * d.shape_.hidden_size),
          q(static_cast<size_t>(capacity) * d.shape_.heads.heads * d.shape_.heads.head_dim),
          k(static_cast<size_t>(capacity) * d.shape_.heads.kv_heads * d.shape_.heads.head_dim),
          v(k.size()),
          up(static_cast<size_t>(capacity) * d.shape_.intermediate_size),
          logits(static_cast<size_t>(std::min(capacity, kHeadTokens)) * d.shape_.vocab_size),
          normed(capacity, d.shape_.hidden_size),
          attended(capacity, d.shape_.heads.heads * d.shape_.heads.head_dim),
          gated(capacity, d.shape_.intermediate_size),
          final_normed(std::min(capacity, kHeadTokens), d.shape_.hidden_size),
          scratch(static_cast<size_t>(d.runner_->pool.size())),
          screening{std::vector<float>(scratch.size() * kHeadTokens)} {
        for (const Layer& layer : d.layers_) {
            auto reserve = [&](const LinearPtr& linear, const Norm& own_norm, Activations& own) {
                if (!own_norm.empty() && own.columns() == 0) own = Activations(capacity, d.shape_.hidden_size);
                (own_norm.empty() ? normed : own).reserve(*linear);
            };
            reserve(layer.q, layer.own.q, own_normed[0]);
            reserve(layer.k, layer.own.k, own_normed[1]);
            reserve(layer.v, layer.own.v, own_normed[2]);
            reserve(layer.gate, layer.own.gate, own_normed[0]);
            reserve(layer.up, layer.own.up, own_normed[1]);
            attended.reserve(*layer.o);
            gated.reserve(*layer.down);
            if (layer.adapter && entry.columns() == 0) entry = Activations(capacity, d.shape_.hidden_size);
        }
        d.head_->reserve(final_normed);
        for (Linear::Scratch& s : scratch) {
            for (const Layer& layer : d.layers_)
                for (const LinearPtr& linear :
                     {layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down, layer.adapter})
                    if (linear) linear->reserve(capacity, d.runner_->pool.size(), s);
            d.head_->reserve(std::min(capacity, kHeadTokens), d.runner_->pool.size(), s);
        }
    }

    /// What a linear reads that shares its input with others: that, or its own place behind its own norm.
    const Activations& input(const Norm& own_norm, int place) const {
        return own_norm.empty() ? normed : own_normed[place];
    }

    int capacity;
    AlignedArray<float> hidden;  // the residual stream
    AlignedArray<float> q, k, v, up, logits;
    Activations normed, attended, gated, final_normed;
    Activations entry;                     // what a layer with an adapter was given
    Activations own_normed[3];             // for q or gate, k or up, and v, where they have norms of their own
    std::vector<Linear::Scratch> scratch;  // per thread
    Head::Scratch screening;
};

/// What is wanted of one token of the batch.
struct Decoder::Output {
    int token;
    float* logits;  // null: the likelihood of target
    int target;
    float* nll;
    bool may_screen;  // a next token is drawn from these logits: the low ones need not be exact
};

Decoder::Decoder(std::shared_ptr<Runner> runner, const DecoderShape& shape, RowsPtr embedding,
                 std::vector<Layer> layers, Norm final_norm, HeadPtr head, int kv_bits, const Density* forced)
    : runner_(std::move(runner)),
      shape_(shape),
      embedding_(std::move(embedding)),
      layers_(std::move(layers)),
      final_norm_(std::move(final_norm)),
      head_(std::move(head)),
      pages_(static_cast<int>(layers_.size()), shape.heads.kv_heads, shape.heads.head_dim, kv_bits),
      attention_(shape.heads, shape.rotary, pages_, runner_->kernels, runner_->pool.size()),
      sparse_ffn_(runner_->kernels, shape.intermediate_size, shape.hidden_size, static_cast<int>(layers_.size()),
                  runner_->pool.size(), forced) {
    const bool sparse = std::all_of(layers_.begin(), layers_.end(), [&](const Layer& l) { return is_sparse(l); });
    if (forced && (layers_.empty() || !sparse))
        throw std::invalid_argument(
            "a density can be forced only on ternary models with a ReLU^2 gate in layout l64_3");
}

int Decoder::create() {
    std::lock_guard lock(mutex_);
    return pages_.create();
}

int Decoder::fork(int sequence) {
    std::lock_guard lock(mutex_);
    return pages_.fork(sequence);
}

void Decoder::truncate(int sequence, int length) {
    std::lock_guard lock(mutex_);
    pages_.truncate(sequence, length);
}

void Decoder::free(int sequence) {
    std::lock_guard lock(mutex_);
    pages_.free(sequence);
}

int Decoder::length(int sequence) const {
    std::lock_guard lock(mutex_);
    return pages_.at(sequence).length;
}

bool Decoder::is_sparse(const Layer& layer) const {
    return shape_.activation == Gate::kRelu2 && dynamic_cast<const RowLinear*>(layer.up.get()) &&
           dynamic_cast<const ColumnLinear*>(layer.down.get());
}

size_t Decoder::ffn_bytes() const {
    size_t bytes = 0;
    for (const Layer& layer : layers_)
        for (const LinearPtr& l : {layer.gate, layer.up, layer.down}) bytes += l->bytes();
    return bytes;
}

double Decoder::ffn_bytes_per_token() const {
    const Density used = density();
    double bytes = static_cast<double>(ffn_bytes());
    for (const Layer& layer : layers_)
        if (is_sparse(layer))
            bytes -= (1.0 - used.up) * static_cast<double>(layer.up->bytes()) +
                     (1.0 - used.down) * static_cast<double>(layer.down->bytes());
    return bytes;
}

double Decoder::bytes_per_token() const {
    size_t bytes = embedding_->row_bytes() + head_->bytes() + final_norm_.size() * sizeof(float);
    for (const Layer& layer : layers_) {
        for (const LinearPtr& l : {layer.q, layer.k, layer.v, layer.o}) bytes += l->bytes();
        const OwnNorms& own = layer.own;
        for (const Norm* n :
             {&layer.input_norm, &layer.post_attention_norm, &layer.attn_sub_norm, &layer.ffn_sub_norm, &layer.q_norm,
              &layer.k_norm, &own.q, &own.k, &own.v, &own.o, &own.gate, &own.up, &own.down})
            bytes += n->size() * sizeof(float);
        if (layer.adapter) bytes += layer.adapter->bytes();
    }
    return static_cast<double>(bytes) + ffn_bytes_per_token();
}

void Decoder::require_valid(const std::vector<Job>& jobs) const {
    auto require = [](bool good, const std::string& message) {
        if (!good) throw std::invalid_argument(message);
    };
    std::set<int> seen;
    for (const Job& job : jobs) {
        const std::string name = "sequence " + std::to_string(job.sequence);
        const int length = pages_.at(job.sequence).length;
        require(seen.insert(job.sequence).second, name + " occurs in two jobs of one step");
        require(job.count > 0, name + " has a job without tokens");
        require(job.count <= shape_.context_length - length,
                name + " would have " + std::to_string(static_cast<int64_t>(length) + job.count) +
                    " tokens, more than the context length of " + std::to_string(shape_.context_length));
        for (int t = 0; t < job.count; ++t) {
            require(job.tokens[t] >= 0 && job.tokens[t] < shape_.vocab_size,
                    "token " + std::to_string(job.tokens[t]) + " of " + name + " is outside the vocabulary of " +
                        std::to_string(shape_.vocab_size));
            if (job.want == Want::kNll)
                require(job.targets[t] >= -1 && job.targets[t] < shape_.vocab_size,
                        "target " + std::to_string(job.targets[t]) + " of " + name + " is outside the vocabulary of " +
                            std::to_string(shape_.vocab_size));
        }
    }
}

std::vector<Token> Decoder::place(const std::vector<Job>& jobs) {
    std::vector<Token> tokens;
    for (const Job& job : jobs) {
        pages_.reserve(job.sequence, job.count);
        const Sequence& sequence = pages_.at(job.sequence);
        for (int t = 0; t < job.count; ++t) tokens.push_back({job.tokens[t], &sequence, sequence.length + t});
    }
    attention_.prepare(tokens, static_cast<int>(layers_.size()));
    return tokens;
}

Decoder::Workspace& Decoder::workspace(int tokens) {
    if (!workspace_ || workspace_->capacity < tokens) workspace_ = std::make_shared<Workspace>(tokens, *this);
    return *workspace_;
}

void Decoder::step(const std::vector<Job>& jobs) {
    std::lock_guard lock(mutex_);
    require_valid(jobs);
    if (jobs.empty()) return;
    const std::vector<Token> tokens = place(jobs);
    std::vector<Output> outputs;
    int first = 0;
    for (const Job& job : jobs) {
        for (int t = job.want == Want::kLast ? job.count - 1 : 0; t < job.count && job.want != Want::kNone; ++t) {
            float* logits = job.want == Want::kNll   ? nullptr
                            : job.want == Want::kAll ? job.out + static_cast<ptrdiff_t>(t) * shape_.vocab_size
                                                     : job.out;
            const bool nll = job.want == Want::kNll;
            outputs.push_back(
                {first + t, logits, nll ? job.targets[t] : -1, nll ? job.out + t : nullptr, job.want == Want::kLast});
        }
        first += job.count;
    }
    Workspace& w = workspace(static_cast<int>(tokens.size()));
    runner_->pool.run([&](Team& team) {
        const Range mine = team.share(static_cast<int>(tokens.size()));
        for (int t = mine.begin; t < mine.end; ++t) {
            embedding_->copy_row(tokens[t].id, w.hidden.data() + static_cast<ptrdiff_t>(t) * shape_.hidden_size);
            embedding_->looked_up(1, true);
        }
        for (int layer = 0; layer < static_cast<int>(layers_.size()); ++layer)
            run_layer(team, layer, static_cast<int>(tokens.size()), w);
        run_head(team, outputs, w);
    });
    for (const Job& job : jobs) pages_.advance(job.sequence, job.count);
}

// Each thread keeps its own tokens from one layer to the next (hidden rows of `mine`), so a barrier stands only where
// the work is cut differently: by tokens around the norms, by rows in the linears, by heads in attention.
void Decoder::run_layer(Team& team, int index, int n, Workspace& w) {
    const Layer& layer = layers_[static_cast<size_t>(index)];
    const Kernels& kernels = runner_->kernels;
    const ptrdiff_t hidden = shape_.hidden_size;
    const Range mine = team.share(n);
    Linear::Scratch& scratch = w.scratch[static_cast<size_t>(team.rank)];
    auto apply = [&](const LinearPtr& linear, const Activations& x, float* out, Linear::Write write) {
        deal_out(team, *linear, x, n, out, write, scratch);
    };

    for (int t = mine.begin; t < mine.end; ++t) {
        const float* x = w.hidden.data() + t * hidden;
        if (layer.adapter) std::copy(x, x + hidden, w.entry.row(t));
        norm(x, layer.input_norm, w.normed.row(t));
        quantize_inputs(
            t, {{&layer.own.q, layer.q.get()}, {&layer.own.k, layer.k.get()}, {&layer.own.v, layer.v.get()}}, w);
    }
    team.barrier();
    apply(layer.q, w.input(layer.own.q, 0), w.q.data(), Linear::Write::kStore);
    apply(layer.k, w.input(layer.own.k, 1), w.k.data(), Linear::Write::kStore);
    apply(layer.v, w.input(layer.own.v, 2), w.v.data(), Linear::Write::kStore);
    team.barrier();
    const HeadNorms head_norms{layer.q_norm.empty() ? nullptr : layer.q_norm.data(),
                               layer.k_norm.empty() ? nullptr : layer.k_norm.data(), shape_.rms_norm_eps};
    attention_.store(team, index, w.q.data(), w.k.data(), w.v.data(), head_norms);
    team.barrier();
    attention_.attend(team, index, w.attended.row(0), w.attended.stride());
    team.barrier();
    for (int t = mine.begin; t < mine.end; ++t) {
        norm_in_place(w.attended.row(t), layer.attn_sub_norm, layer.own.o);
        w.attended.quantize(t, kernels, {layer.o.get()});
    }
    team.barrier();
    apply(layer.o, w.attended, w.hidden.data(), Linear::Write::kAdd);
    team.barrier();

    for (int t = mine.begin; t < mine.end; ++t) {
        norm(w.hidden.data() + t * hidden, layer.post_attention_norm, w.normed.row(t));
        quantize_inputs(t, {{&layer.own.gate, layer.gate.get()}, {&layer.own.up, layer.up.get()}}, w);
    }
    team.barrier();
    run_ffn(team, index, n, w);
    if (layer.adapter) {
        apply(layer.adapter, w.entry, w.hidden.data(), Linear::Write::kAdd);
        team.barrier();
    }
}

void Decoder::run_ffn(Team& team, int index, int n, Workspace& w) {
    const Layer& layer = layers_[static_cast<size_t>(index)];
    const Activations &gate_input = w.input(layer.own.gate, 0), &up_input = w.input(layer.own.up, 1);
    if (n <= kLineTokens && is_sparse(layer)) {
        const SparseLayer sparse{*layer.gate, dynamic_cast<const RowLinear&>(*layer.up),
                                 dynamic_cast<const ColumnLinear&>(*layer.down),
                                 [&](float* row) { norm_in_place(row, layer.ffn_sub_norm, layer.own.down); }};
        return sparse_ffn_.run(team, index, sparse,
                               {n, gate_input, up_input, w.gated, w.up.data(), w.hidden.data(), w.scratch});
    }
    const ptrdiff_t inner = shape_.intermediate_size;
    const Range mine = team.share(n);
    Linear::Scratch& scratch = w.scratch[static_cast<size_t>(team.rank)];
    const Kernels& kernels = runner_->kernels;
    const auto activate = shape_.activation == Gate::kSilu ? kernels.vectors->silu_gate : kernels.vectors->relu2_gate;
    Chunks chunks(team, static_cast<int>(inner), layer.gate->rows_together());
    for (Range rows = chunks.next(); !rows.empty(); rows = chunks.next()) {
        layer.gate->apply(rows, gate_input, n, w.gated.row(0), w.gated.stride(), Linear::Write::kStore, scratch);
        layer.up->apply(rows, up_input, n, w.up.data(), inner, Linear::Write::kStore, scratch);
        for (int t = 0; t < n; ++t)
            activate(w.gated.row(t) + rows.begin, w.up.data() + t * inner + rows.begin, rows.end - rows.begin);
    }
    team.barrier();
    for (int t = mine.begin; t < mine.end; ++t) {
        norm_in_place(w.gated.row(t), layer.ffn_sub_norm, layer.own.down);
        w.gated.quantize(t, kernels, {layer.down.get()});
    }
    team.barrier();
    deal_out(team, *layer.down, w.gated, n, w.hidden.data(), Linear::Write::kAdd, scratch);
    team.barrier();
}

void Decoder::norm(const float* x, const Norm& weight, float* out) const {
    runner_->kernels.vectors->rms_norm(x, weight.data(), static_cast<int>(weight.size()), shape_.rms_norm_eps, out);
}

void Decoder::norm_in_place(float* x, const Norm& sub_norm, const Norm& own_norm) const {
    if (!sub_norm.empty()) norm(x, sub_norm, x);
    if (!own_norm.empty())
        runner_->kernels.vectors->rms_norm(x, own_norm.data(), static_cast<int>(own_norm.size()),
                                           shape_.linear_norm_eps, x);
}

/// Codes of a token's normed input, and of the same behind the norm of each linear that has one.
void Decoder::quantize_inputs(int token, std::initializer_list<Reader> readers, Workspace& w) const {
    const Kernels& kernels = runner_->kernels;
    const Linear* shared[kMostReaders] = {};
    int place = 0;
    for (const Reader& reader : readers) {
        const Activations& x = w.own_normed[place++];
        if (reader.own_norm->empty()) {
            shared[place - 1] = reader.linear;
            continue;
        }
        kernels.vectors->rms_norm(w.normed.row(token), reader.own_norm->data(),
                                  static_cast<int>(reader.own_norm->size()), shape_.linear_norm_eps, x.row(token));
        x.quantize(token, kernels, {reader.linear});
    }
    w.normed.quantize(token, kernels, {shared[0], shared[1], shared[2]});
}

float Decoder::negative_log_likelihood(const float* logits, int target) const {
    if (target < 0) return 0.0f;
    return static_cast<float>(runner_->kernels.vectors->log_sum_exp(logits, shape_.vocab_size) -
                              static_cast<double>(logits[target]));
}

void Decoder::run_head(Team& team, const std::vector<Output>& outputs, Workspace& w) const {
    const ptrdiff_t vocab = shape_.vocab_size;
    const int chunk = std::min(w.capacity, kHeadTokens);
    team.barrier();  // with no layers at all, the embedding is still being looked up
    for (size_t begin = 0; begin < outputs.size(); begin += static_cast<size_t>(chunk)) {
        const int n = std::min(chunk, static_cast<int>(outputs.size() - begin));
        const Output* part = outputs.data() + begin;
        const bool all_exact = std::any_of(part, part + n, [](const Output& o) { return !o.may_screen; });
        const Range mine = team.share(n), rows = team.share(static_cast<int>(vocab));
        for (int i = mine.begin; i < mine.end; ++i) {
            norm(w.hidden.data() + static_cast<ptrdiff_t>(part[i].token) * shape_.hidden_size, final_norm_,
                 w.final_normed.row(i));
            w.final_normed.quantize(i, runner_->kernels, {});
        }
        team.barrier();
        head_->run(team, w.final_normed, n, all_exact, w.logits.data(), vocab,
                   w.scratch[static_cast<size_t>(team.rank)], w.screening);
        team.barrier();
        for (int i = 0; i < n; ++i) {
            const float* logits = w.logits.data() + i * vocab;
            if (part[i].logits && !rows.empty())
                std::copy(logits + rows.begin, logits + rows.end, part[i].logits + rows.begin);
        }
        team.barrier();
        for (int i = mine.begin; i < mine.end; ++i)
            if (part[i].nll) *part[i].nll = negative_log_likelihood(w.logits.data() + i * vocab, part[i].target);
        team.barrier();
    }
}

}  // namespace tritkit

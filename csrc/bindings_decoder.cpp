// The forward step and the sampler for Python.
#include "bindings.h"
#include "sampling.h"

namespace tritkit {

Rotary rotary_of(const Array& frequencies, int head_dim, float factor) {
    if (head_dim < 2 || head_dim % 2) throw nb::value_error("head_dim must be even");
    return {norm(frequencies, "inverse_frequencies", head_dim / 2), factor};
}

namespace {

std::shared_ptr<Linear> linear_of(const nb::dict& layer, const char* name, int rows, int columns) {
    auto linear = nb::cast<std::shared_ptr<Linear>>(layer[name]);
    require_shape(*linear, name, rows, columns);
    return linear;
}

LinearPtr adapter_of(const nb::dict& layer, int hidden) {
    if (layer["adapter"].is_none()) return nullptr;
    auto adapter = linear_of(layer, "adapter", hidden, hidden);
    if (adapter->activations() != ActivationFormat::kFloat) throw nb::value_error("an adapter must have floats");
    return adapter;
}

Norm norm_of(const nb::dict& layer, const char* name, int size) {
    return norm(nb::cast<std::optional<Array>>(layer[name]), name, size);
}

Layer layer_of(const nb::dict& d, const DecoderShape& s) {
    const int q = s.heads.heads * s.heads.head_dim, kv = s.heads.kv_heads * s.heads.head_dim;
    const auto q_proj = linear_of(d, "q", q, s.hidden_size), k_proj = linear_of(d, "k", kv, s.hidden_size),
               v_proj = linear_of(d, "v", kv, s.hidden_size),
               gate = linear_of(d, "gate", s.intermediate_size, s.hidden_size),
               up = linear_of(d, "up", s.intermediate_size, s.hidden_size);
    share_places({q_proj.get(), k_proj.get(), v_proj.get()});
    share_places({gate.get(), up.get()});
    return {q_proj,
            k_proj,
            v_proj,
            linear_of(d, "o", s.hidden_size, q),
            gate,
            up,
            linear_of(d, "down", s.hidden_size, s.intermediate_size),
            norm_of(d, "input_norm", s.hidden_size),
            norm_of(d, "post_attention_norm", s.hidden_size),
            norm_of(d, "attn_sub_norm", q),
            norm_of(d, "ffn_sub_norm", s.intermediate_size),
            norm_of(d, "q_norm", s.heads.head_dim),
            norm_of(d, "k_norm", s.heads.head_dim),
            {norm_of(d, "q_own_norm", s.hidden_size), norm_of(d, "k_own_norm", s.hidden_size),
             norm_of(d, "v_own_norm", s.hidden_size), norm_of(d, "o_own_norm", q),
             norm_of(d, "gate_own_norm", s.hidden_size), norm_of(d, "up_own_norm", s.hidden_size),
             norm_of(d, "down_own_norm", s.intermediate_size)},
            adapter_of(d, s.hidden_size)};
}

DecoderShape shape_from(const nb::dict& d) {
    auto whole = [&](const char* name) {
        const int value = nb::cast<int>(d[name]);
        if (value < 1) throw nb::value_error((std::string(name) + " must be positive").c_str());
        return value;
    };
    DecoderShape s{whole("vocab_size"),
                   whole("hidden_size"),
                   whole("intermediate_size"),
                   {whole("num_heads"), whole("num_kv_heads"), whole("head_dim")},
                   {},
                   nb::cast<float>(d["rms_norm_eps"]),
                   gate_activation(nb::cast<std::string>(d["activation"])),
                   whole("context_length")};
    if (s.heads.heads % s.heads.kv_heads) throw nb::value_error("num_heads must be a multiple of num_kv_heads");
    s.rotary =
        rotary_of(nb::cast<Array>(d["inverse_frequencies"]), s.heads.head_dim, nb::cast<float>(d["attention_factor"]));
    s.linear_norm_eps = nb::cast<float>(d["linear_norm_eps"]);
    return s;
}

void init_decoder(Decoder* self, std::shared_ptr<Runner> runner, const nb::dict& shape,
                  std::shared_ptr<RowTable> embedding, const nb::list& layers, const Array& final_norm,
                  std::shared_ptr<Head> head, int kv_bits, std::optional<std::pair<double, double>> density) {
    const DecoderShape s = shape_from(shape);
    require_shape(*embedding, "embedding", s.vocab_size, s.hidden_size);
    require_shape(*head, "head", s.vocab_size, s.hidden_size);
    if (density && !(density->first >= density->second && density->second >= 0.0 && density->first <= 1.0))
        throw nb::value_error("density must be two shares, 1 >= up >= down >= 0");
    const Density forced = density ? Density{density->first, density->second} : Density{};
    std::vector<Layer> built;
    for (nb::handle layer : layers) built.push_back(layer_of(nb::cast<nb::dict>(layer), s));
    new (self)
        Decoder(std::move(runner), s, std::move(embedding), std::move(built),
                norm(final_norm, "final_norm", s.hidden_size), std::move(head), kv_bits, density ? &forced : nullptr);
}

Want want_of(const std::string& name) {
    if (name == "none") return Want::kNone;
    if (name == "last") return Want::kLast;
    if (name == "all") return Want::kAll;
    if (name == "nll") return Want::kNll;
    throw nb::value_error(("want is '" + name + "', expected none, last, all or nll").c_str());
}

/// (sequence, tokens, want, targets), without a place for the results. The arrays stay alive in the tuple.
Job job_of(nb::handle item) {
    const nb::tuple fields = nb::cast<nb::tuple>(item);
    const Array tokens = nb::cast<Array>(fields[1]);
    const auto targets = nb::cast<std::optional<Array>>(fields[3]);
    Job job{nb::cast<int>(fields[0]),
            checked<int32_t>(tokens, "tokens", 1),
            static_cast<int>(tokens.shape(0)),
            want_of(nb::cast<std::string>(fields[2])),
            nullptr,
            nullptr};
    if (job.want == Want::kNll) {
        if (!targets) throw nb::value_error("want is 'nll' but targets is None");
        job.targets = checked<int32_t>(*targets, "targets", {job.count});
    }
    return job;
}

nb::list step(Decoder& decoder, const nb::list& jobs) {
    std::vector<Job> built;
    nb::list results;
    for (nb::handle item : jobs) {
        Job job = job_of(item);
        const size_t count = static_cast<size_t>(job.count), vocab = static_cast<size_t>(decoder.shape().vocab_size);
        switch (job.want) {
            case Want::kNone:
                results.append(nb::none());
                break;
            case Want::kLast:
                results.append(new_array(job.out, {vocab}));
                break;
            case Want::kAll:
                results.append(new_array(job.out, {count, vocab}));
                break;
            case Want::kNll:
                results.append(new_array(job.out, {count}));
                break;
        }
        built.push_back(job);
    }
    {
        nb::gil_scoped_release release;
        decoder.step(built);
    }
    return results;
}

}  // namespace

void bind_decoder(nb::module_& m) {
    nb::class_<Decoder>(m, "Decoder", "The whole forward step.")
        .def("__init__", &init_decoder, "runner"_a, "shape"_a, "embedding"_a, "layers"_a, "final_norm"_a, "head"_a,
             "kv_bits"_a = 16, "density"_a.none() = nb::none())
        .def("new", &Decoder::create, Release())
        .def("fork", &Decoder::fork, "sequence"_a, Release())
        .def("truncate", &Decoder::truncate, "sequence"_a, "length"_a, Release())
        .def("free", &Decoder::free, "sequence"_a, Release())
        .def("length", &Decoder::length, "sequence"_a, Release())
        .def("step", &step, "jobs"_a, "List of (sequence, int32 tokens, want, int32 targets or None).")
        .def_prop_ro("bytes_per_token", &Decoder::bytes_per_token)
        .def_prop_ro("ffn_bytes_per_token", &Decoder::ffn_bytes_per_token)
        .def_prop_ro("ffn_bytes", &Decoder::ffn_bytes)
        .def_prop_ro("density", [](const Decoder& d) { return std::pair(d.density().up, d.density().down); })
        .def_prop_ro("kv_bits", &Decoder::kv_bits)
        .def_prop_ro("kv_bytes_per_position", &Decoder::kv_bytes_per_position);

    nb::class_<Sampler>(m, "Sampler", "Draws tokens from logits.")
        .def(
            "__init__",
            [](Sampler* self, float temperature, int top_k, double top_p, double min_p, float repetition_penalty,
               uint64_t seed) {
                new (self) Sampler(SamplingOptions{temperature, top_k, top_p, min_p, repetition_penalty}, seed);
            },
            "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "repetition_penalty"_a, "seed"_a)
        .def("sample",
             [](Sampler& self, const Array& logits, const Array& history) {
                 const float* values = checked<float>(logits, "logits", 1);
                 const int32_t* tokens = checked<int32_t>(history, "history", 1);
                 return self.sample(values, static_cast<int>(logits.shape(0)), tokens,
                                    static_cast<int>(history.shape(0)));
             })
        .def("distribution", [](Sampler& self, const Array& logits, const Array& history) {
            const float* values = checked<float>(logits, "logits", 1);
            const int32_t* tokens = checked<int32_t>(history, "history", 1);
            return self.distribution(values, static_cast<int>(logits.shape(0)), tokens,
                                     static_cast<int>(history.shape(0)));
        });
}

}  // namespace tritkit

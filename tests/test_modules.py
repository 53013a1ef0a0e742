"""quantize(module, recipe, batches): modules that are not ours, in place."""

import copy
import gc
from functools import partial

import pytest
import torch
from module_models import Block, Chain, Encoder, Residual, encoder, llama, torch_encoder
from torch import nn

from tritkit import quantize
from tritkit.formats import format_of
from tritkit.methods.recipe import LoadedRecipe, QwtOptions, Recipe, read_recipe
from tritkit.methods.watch import blocks_of
from tritkit.stored import StoredLinear


def test_linears_run_in_their_own_bits_on_the_formats_grid():
    model, batches = encoder()
    weights = {n: m.weight.detach().clone() for n, m in model.layers.named_modules() if isinstance(m, nn.Linear)}
    report = quantize(model, "int4_g16", batches)
    assert set(report["per_linear"]) == {f"layers.{n}" for n in weights} and len(weights) == 9
    for name, w in weights.items():
        module = model.layers.get_submodule(name)
        assert isinstance(module, StoredLinear)
        wanted = format_of("int4_g16").quantize(w).dequantize()
        x = torch.randn(5, 32)
        bias = 0 if module.bias is None else module.bias
        assert torch.allclose(module(x), x @ wanted.t() + bias, atol=1e-5)
    assert isinstance(model.enter, nn.Linear) and not isinstance(model.enter, StoredLinear)
    assert report["bytes"] == sum(32 * 32 // 2 + 32 * 2 * 2 + 4 for _ in weights)  # codes, float16 scales, the header
    assert report["bits_per_weight"] == 8 * report["bytes"] / sum(w.numel() for w in weights.values())


def test_keywords_and_the_rest_of_a_tuple_go_through():
    model, batches = encoder()
    with torch.no_grad():
        before = [model(**b)["hidden"] for b in batches]
        quantize(model, read_recipe(None, {"format": "int8_g8", "method": "gptq", "correct": "qwt"}), batches)
        after = [model(**b)["hidden"] for b in batches]
    assert max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True)) < 0.05


def test_calibration_sees_what_the_model_is_called_with():
    """Codes are those of the same blocks with the mask built in, and not those without it."""
    codes = []
    for kind in ("given", "built in", "none"):
        model, batches = encoder()
        for batch in batches:
            batch["mask"] = (batch["mask"] > 0.5).float()[:1].expand(2, -1, -1) * 3
        mask = batches[0]["mask"]
        batches = [{"x": b["x"], "mask": mask} for b in batches]
        if kind == "built in":
            for layer in model.layers:
                layer.forward = partial(layer.forward, mask=mask)
            model.forward = lambda x, model=model: {"hidden": model.leave(in_order(model, model.enter(x)))}
        if kind != "given":
            batches = [{"x": b["x"]} for b in batches]
        quantize(model, read_recipe(None, {"format": "int3_row", "method": "gptq"}), batches)
        codes.append(torch.cat([layer.out.floats(slice(None)).flatten() for layer in model.layers]))
    assert torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])


def in_order(model, x):
    for layer in model.layers:
        x, _ = layer(x)
    return x


def test_convolutions_are_matrices():
    torch.manual_seed(0)
    model, batches = Residual().eval(), [torch.randn(4, 1, 10, 10) for _ in range(4)]
    float_weight = model.stages[0][0].first.weight.detach().clone()
    with torch.no_grad():
        before = model(batches[0])
        report = quantize(model, read_recipe(None, {"format": "int4_row", "method": "gptq"}), batches)
        after = model(batches[0])
    assert list(report["per_linear"]) == [f"stages.{b}.{n}" for b in ("0.0", "0.1", "1.0") for n in ("first", "second")]
    weight = model.stages[0][0].first.weight
    levels = [len(row.unique()) for row in weight.flatten(1)]
    assert max(levels) <= 16 and not torch.equal(weight, float_weight)
    assert 0 < float((after - before).norm() / before.norm()) < 0.5


def test_blocks_are_found():
    model, _ = encoder()
    assert list(blocks_of(model)) == ["layers.0", "layers.1", "layers.2"]
    assert list(blocks_of(model, "layers")) == ["layers.0", "layers.1", "layers.2"]
    assert list(blocks_of(model, ["layers.1"])) == ["layers.1"]
    assert list(blocks_of(Residual())) == ["stages.0.0", "stages.0.1", "stages.1.0"]


def test_a_model_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    batches = [{"input_ids": torch.randint(0, 50, (2, 16))} for _ in range(4)]
    report = quantize(model, read_recipe(None, {"format": "int4_g16", "method": "gptq", "correct": "qwt"}), batches)
    assert list(report["adapters"]) == ["encoder.layer.0", "encoder.layer.1"] and len(report["per_linear"]) == 12


def test_a_decoder_is_calibrated_without_its_cache():
    """By default transformers hands all blocks a cache, to which each call appends and of which each call reads."""
    found = []
    for use_cache in (False, True):
        model, batches = llama(use_cache)
        recipe = {"format": "int3_g32", "method": "gptq", "correct": "qwt"}
        report = quantize(model, read_recipe(None, recipe), batches)
        with torch.no_grad():
            found.append((report["adapters"], model(batches[0]).logits))
    assert found[0][0] == found[1][0]
    assert any(a["kept"] and a["r2_held_out"] > 0.1 for a in found[0][0].values())
    assert torch.equal(found[0][1], found[1][1])


@torch.no_grad()
def test_blocks_of_a_decoder_can_be_called_again():
    from tritkit.methods.watch import Watch

    model, batches = llama(True)
    blocks, outputs = blocks_of(model), {}
    for name, block in blocks.items():
        block.register_forward_hook(lambda m, args, output, name=name: outputs.setdefault(name, output))
    watch = Watch(blocks, {})
    model(batches[0])
    watch.end()
    state = watch.inputs["model.layers.0"]
    for name, block in blocks.items():
        args, kwargs, _ = watch.calls[name]
        assert kwargs["use_cache"] is False and not any(hasattr(v, "get_seq_length") for v in kwargs.values())
        for _ in range(3):
            assert torch.equal(block(state, *args, **kwargs), outputs[name])
        state = outputs[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [None, "int8_row"])
def test_a_module_keeps_its_dtype(dtype, inputs):
    model, batches = encoder()
    with torch.no_grad():
        wanted = model(**batches[0])["hidden"]
    model = model.to(dtype)
    batches = [{k: v.to(dtype) for k, v in b.items()} for b in batches]
    recipe = Recipe(format="int6_g16", inputs=inputs, correct="qwt", qwt=QwtOptions(check=False, finetune=1))
    report = quantize(model, LoadedRecipe(recipe), batches)
    assert any(entry["kept"] for entry in report["adapters"].values())
    with torch.no_grad():
        found = model(**batches[0])["hidden"]
    assert found.dtype == dtype
    assert float((found.float() - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("method", [None, "rtn", "gptq"])
@pytest.mark.parametrize("padded", [False, True])
def test_linears_that_are_not_called_are_left_alone(method, padded):
    model, batches = torch_encoder()
    padding = torch.arange(12) >= torch.tensor([12, 9] * 8)[:, None]
    some = {"src": batches[0], "src_key_padding_mask": padding if padded else None}
    given = [{**some, "src": x} for x in batches] if method else []
    with torch.no_grad():
        before = model(**some)
        report = quantize(model, read_recipe(None, {"format": "int4_g16", "method": method or "rtn"}), given)
        after = model(**some)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            slow = model(**some)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert report["left"] == [f"layers.{i}.self_attn.out_proj" for i in range(2)]
    assert list(report["per_linear"]) == [f"layers.{i}.linear{n}" for i in range(2) for n in (1, 2)]
    assert all(isinstance(block.linear1, StoredLinear) for block in model.layers)
    real = ~padding if padded else slice(None)
    assert torch.allclose(after[real], slow[real], atol=1e-5)
    assert 0.001 < float((after - before)[real].norm() / before[real].norm()) < 0.3


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_memory_is_the_float_model_and_codes(monkeypatch, method):
    """At the last of eight blocks: the floats that an error would put back, the codes of seven, and that block."""
    from tritkit.methods import modules

    model = Chain([nn.Sequential(nn.Linear(128, 512), nn.Tanh(), nn.Linear(512, 128)) for _ in range(8)]).eval()
    floats = sum(p.numel() * 4 for p in model.parameters())
    held = []

    def bytes_held():
        """Of all tensors that there are, each storage once."""
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
        tensors += [p.data for p in tensors if isinstance(p, nn.Parameter)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def counted(*args, run=modules.run_block, **kwargs):
        held.append(bytes_held())
        return run(*args, **kwargs)

    monkeypatch.setattr(modules, "run_block", counted)
    quantize(model, Recipe(format="int4_g32", method=method), [torch.randn(2, 128)], blocks="layers")
    before = held[0] - floats  # what else the process holds
    assert held[-1] - before < 1.4 * floats, [round((h - before) / floats, 2) for h in held]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("batches", [True, False])
def test_linears_that_have_several_names_or_none(method, batches):
    """One that two blocks share, a module of one that two share, and one that is called through a list that is no
    submodule."""
    if method == "gptq" and not batches:
        pytest.skip("gptq needs data")
    model = Chain([nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)) for _ in range(3)]).eval()
    model.layers[2][0] = model.layers[1][0]
    model.layers[1][2] = model.layers[2][2] = nn.Sequential(nn.Linear(32, 32))
    hidden = [model.layers[0][2]]
    model.layers[0].forward = lambda x: hidden[0](torch.tanh(model.layers[0][0](x)))
    x = torch.randn(64, 32)
    wanted = model(x)
    report = quantize(model, Recipe(format="int6_g32", method=method), [x] if batches else None, blocks="layers")
    assert model.layers[2][0] is model.layers[1][0] and isinstance(model.layers[1][0], StoredLinear)
    found = model(x)
    assert len(report["per_linear"]) == 6 and 0 < (found - wanted).norm() / wanted.norm() < 0.05
    if batches:
        stored = model.layers[0][2]
        assert torch.equal(hidden[0].weight, stored.floats(slice(None)))


def test_inference_mode_and_loaders_are_fine():
    """Inputs made in inference mode do not count what is written to them; a loader may not know its length."""

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1)))

    model = Chain([nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(3)]).eval()
    with torch.inference_mode():
        inside = [torch.randn(4, 32)]
    assert len(quantize(copy.deepcopy(model), "int4_g32", inside, blocks="layers")["per_linear"]) == 3
    loader = torch.utils.data.DataLoader(Endless(), batch_size=None)
    report = quantize(model, Recipe(format="int4_g32", method="gptq"), loader, blocks="layers")
    assert next(iter(report["per_linear"].values()))["calibration_tokens"] == 15


def test_a_single_batch_is_split():
    """R^2 held out is that of samples which the term was not fitted on, so not of noise that it learnt by heart."""
    model, _ = encoder()
    recipe = Recipe(format="int2_g16", correct="qwt", qwt=QwtOptions(check=False, ridge=0.0, held_out=0.5))
    batch = {"x": torch.randn(6, 6, 8), "mask": torch.rand(6, 6, 1)}
    halves = [{k: v[:3] for k, v in batch.items()}, {k: v[3:] for k, v in batch.items()}]
    report = quantize(model, LoadedRecipe(recipe), [batch])
    wanted = quantize(encoder()[0], LoadedRecipe(recipe), halves)
    assert report["adapters"] == wanted["adapters"]
    for entry in report["adapters"].values():
        assert entry["r2_held_out"] < entry["r2"] - 0.1


def test_some_batches_stay_for_fitting():
    model, batches = encoder()
    recipe = Recipe(format="int3_g16", correct="qwt", qwt=QwtOptions(held_out=0.99))
    assert quantize(model, LoadedRecipe(recipe), batches[:2])["adapters"]


class Depthwise(nn.Module):
    """ConvNeXt's: the only convolution has groups, the weights are in linears behind it."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.wide, self.narrow = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)

    def forward(self, x):
        y = self.conv(x).movedim(1, -1)
        return x + self.narrow(torch.relu(self.wide(y))).movedim(-1, 1)


def test_the_term_of_a_block_of_pictures_is_one_of_pixels():
    torch.manual_seed(0)
    model = Chain([Depthwise(8) for _ in range(2)]).eval()
    recipe = Recipe(format="int2_row", correct="qwt", qwt=QwtOptions(check=False, ridge=0.1))
    report = quantize(model, recipe, [torch.randn(8, 8, 6, 9) for _ in range(4)])
    assert all(entry["kept"] for entry in report["adapters"].values())
    assert model.layers[0].adapter.weight.shape[:2] == (8, 8)
    assert model(torch.randn(1, 8, 12, 5)).shape == (1, 8, 12, 5)


class Casting(Block):
    def forward(self, x, mask=None):
        y = torch.tanh(self.q(x)) * self.k(x)
        return x + self.out(y.to(self.out.weight.dtype)), None


def test_a_module_may_ask_for_the_dtype_of_weights():
    """As the T5 of transformers does."""
    model, x = Encoder().eval(), torch.randn(2, 12, 8)
    model.layers = nn.ModuleList(Casting(32) for _ in range(2))
    wanted = model(x)["hidden"]
    quantize(model, "int8_g16", [x])
    assert model.layers[0].out.weight.dtype == torch.float32 and model.layers[0].out.codes.dtype == torch.uint8
    assert 0 < (model(x)["hidden"] - wanted).abs().max() < 0.05
    kept = model.state_dict()
    assert "layers.0.out.codes" in kept and "layers.0.out.weight" not in kept and len(copy.deepcopy(model)(x)) == 1


@pytest.mark.interop
@pytest.mark.parametrize("recipe", [{"format": "int4_row"}, {"format": "int3_row", "method": "gptq", "correct": "qwt"}])
def test_t5(recipe):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=4)
    model = transformers.T5EncoderModel(config).eval()
    batches = [{"input_ids": torch.randint(0, 100, (4, 16))} for _ in range(3)]
    rounded = copy.deepcopy(model)
    found = quantize(model, read_recipe(None, recipe), batches)
    assert len(found["per_linear"]) == 18
    for name in found["per_linear"]:
        rounded.get_submodule(name).weight.data = model.get_submodule(name).floats(slice(None))
    for layer, other in zip(model.encoder.block, rounded.encoder.block, strict=True):
        if hasattr(layer, "adapter"):
            other.register_forward_hook(lambda _, args, y, term=layer.adapter: (y[0] + term(args[0]), *y[1:]))
    with torch.no_grad():
        torch.testing.assert_close(*(m(**batches[0]).last_hidden_state for m in (model, rounded)))


class Experts(Block):
    """Two linears as one tensor, and a convolution in groups."""

    def __init__(self, features):
        super().__init__(features)
        self.experts = nn.Parameter(torch.randn(2, features, features) / features**0.5)
        self.mix = nn.Conv1d(features, features, 3, padding=1, groups=features)

    def forward(self, x, mask=None):
        y = x + self.mix(x.transpose(1, 2)).transpose(1, 2) + torch.tanh(x @ self.experts[0]) @ self.experts[1]
        return super().forward(y, mask)


def test_weights_that_stay_floats_are_reported(capfd):
    model, x = Encoder().eval(), torch.randn(2, 12, 8)
    assert quantize(model, "int4_g16", [x])["floats"] == {"enter.weight": 256}
    assert "warning" not in capfd.readouterr().err
    model = Encoder().eval()
    model.layers = nn.ModuleList(Experts(32) for _ in range(2))
    found = quantize(model, Recipe(format="int4_g16", correct="qwt", qwt=QwtOptions(check=False)), [x, x])
    inside = {f"layers.{i}.{n}": k for i in range(2) for n, k in (("experts", 2048), ("mix.weight", 96))}
    assert found["floats"] == {"enter.weight": 256, **inside} and any(a["kept"] for a in found["adapters"].values())
    assert "warning: 43% of the weights stay floats, the largest of them layers.0.experts;" in capfd.readouterr().err


@pytest.mark.interop
@pytest.mark.parametrize("recipe", [{"format": "int4_row"}, {"format": "int3_row", "method": "gptq", "correct": "qwt"}])
def test_gpt2_whose_linears_are_transposed(recipe):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=100, n_embd=64, n_layer=3, n_head=4, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    batches = [torch.randint(0, 100, (4, 16)) for _ in range(4)]
    weight = model.transformer.h[1].mlp.c_fc.weight.detach().clone()
    with torch.no_grad():
        wanted = model(batches[0]).logits
    found = quantize(model, read_recipe(None, recipe), batches)
    stored = model.transformer.h[1].mlp.c_fc
    assert len(found["per_linear"]) == 12 and stored.shape == (256, 64) and "lm_head.weight" not in found["floats"]
    if recipe["format"] == "int4_row":
        format = format_of("int4_row")
        assert torch.equal(stored.floats(slice(None)), format.quantize(weight.t()).dequantize())
    with torch.no_grad():
        assert 0 < (model(batches[0]).logits - wanted).abs().max() < 1
    with pytest.raises(ValueError, match="quantised already"):
        quantize(model, "int4_row", batches)


@pytest.mark.interop
def test_a_failed_run_gives_the_transposed_linears_back():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    before = {name: (id(m), type(m)) for name, m in model.named_modules()}
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="gptq needs calibration data"):
        quantize(model, read_recipe(None, {"format": "int4_row", "method": "gptq"}))
    assert {name: (id(m), type(m)) for name, m in model.named_modules()} == before
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


class Merge(nn.Module):
    """Makes one token of two, as Swin does between its stages."""

    def __init__(self, features):
        super().__init__()
        self.reduce = nn.Linear(2 * features, features)

    def forward(self, x):
        return torch.tanh(self.reduce(x.unflatten(1, (-1, 2)).flatten(2)))


def test_a_block_that_merges_tokens_gets_no_term():
    torch.manual_seed(0)
    model = Chain([nn.Sequential(nn.Linear(16, 16), nn.Tanh()), Merge(16), nn.Sequential(nn.Linear(16, 16))]).eval()
    batches = [torch.randn(8, 12, 16) for _ in range(4)]
    recipe = Recipe(format="int2_g16", correct="qwt", qwt=QwtOptions(check=False))
    found = quantize(model, LoadedRecipe(recipe), batches, blocks="layers")["adapters"]
    assert [entry["kept"] for entry in found.values()] == [True, False, True]
    assert found["layers.1"]["note"] == "no term: the block makes (8, 6) rows of (8, 12)"
    assert not hasattr(model.layers[1], "adapter") and model(batches[0]).shape == (8, 6, 16)


class Padded(Encoder):
    """Its blocks look at each token alone, so what stands in padding changes nothing for the others."""

    def forward(self, x, attention_mask=None, src_key_padding_mask=None):
        return super().forward(x)


@pytest.mark.parametrize("name", ["attention_mask", "src_key_padding_mask"])
@pytest.mark.parametrize("single", [False, True])
def test_padding_does_not_count(name, single):
    options = {"format": "int3_g16", "method": "gptq", "correct": "qwt", "inputs": "int8_tensor", "qwt.finetune": "1"}
    torch.manual_seed(0)
    model, other, texts = Padded().eval(), Padded().eval(), [torch.randn(4, 6, 8) for _ in range(1 if single else 4)]
    other.load_state_dict(model.state_dict())
    mask = torch.cat([torch.ones(4, 6), torch.zeros(4, 6)], 1)
    mask = mask.long() if name == "attention_mask" else mask == 0
    padded = [{"x": torch.cat([x, 50 * torch.randn(4, 6, 8)], 1), name: mask} for x in texts]
    found = quantize(model, read_recipe(None, options), padded)
    wanted = quantize(other, read_recipe(None, options), [{"x": x} for x in texts])
    for linear in wanted["per_linear"]:
        stored, same = model.get_submodule(linear), other.get_submodule(linear)
        assert (stored.floats(slice(None)) == same.floats(slice(None))).float().mean() > 0.99
        assert stored.inputs.scale == pytest.approx(float(same.inputs.scale), rel=1e-3)
    for key in ("r2", "r2_held_out", "divergence_before", "divergence_after"):
        reports = zip(found["adapters"].values(), wanted["adapters"].values(), strict=True)
        assert all(a.get(key) == pytest.approx(b.get(key), rel=0.05, abs=1e-5) for a, b in reports)
    assert any(entry["kept"] for entry in wanted["adapters"].values())


@pytest.mark.interop
def test_padding_of_bert_does_not_count():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    torch.manual_seed(0)
    model, other = transformers.BertModel(config).eval(), transformers.BertModel(config).eval()
    other.load_state_dict(model.state_dict())
    texts = [torch.randint(0, 100, (8, 16)) for _ in range(3)]
    mask = torch.cat([torch.ones(8, 16), torch.zeros(8, 48)], 1).long()
    padded = [{"input_ids": nn.functional.pad(ids, (0, 48)), "attention_mask": mask} for ids in texts]
    recipe = read_recipe(None, {"format": "int3_row", "method": "gptq"})
    found, wanted = quantize(model, recipe, padded), quantize(other, recipe, texts)
    for name, record in wanted["per_linear"].items():
        assert found["per_linear"][name]["calibration_tokens"] == record["calibration_tokens"] == 3 * 8 * 16
        same = model.get_submodule(name).floats(slice(None)) == other.get_submodule(name).floats(slice(None))
        assert same.float().mean() > 0.99


@pytest.mark.interop
def test_padding_counts_where_two_texts_are_read():
    """Nothing tells whether the mask is that of the blocks."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BartConfig(
        vocab_size=100, d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=128, decoder_ffn_dim=128,
        encoder_attention_heads=4, decoder_attention_heads=4,
    )  # fmt: skip
    model, mask = transformers.BartModel(config).eval(), torch.ones(4, 16, dtype=torch.long)
    mask[:, 8:] = 0
    batches = [{"input_ids": torch.randint(3, 100, (4, 16)), "attention_mask": mask} for _ in range(2)]
    found = quantize(model, "int4_row", batches, blocks="decoder.layers")
    assert found["per_linear"]["decoder.layers.0.fc1"]["calibration_tokens"] == 2 * 4 * 16

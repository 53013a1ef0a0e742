"""quantize(module, recipe, batches): modules that are not ours, in place."""

from functools import partial

import pytest
import torch
from torch import nn

from tritkit import quantize
from tritkit.formats import format_of
from tritkit.methods.blocks import input_rows, matrix_of
from tritkit.methods.recipe import LoadedRecipe, QwtOptions, Recipe, Rule, read_recipe
from tritkit.methods.stats import SAMPLE, InputStats
from tritkit.methods.watch import blocks_of
from tritkit.stored import StoredLinear


class Block(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.q, self.k = nn.Linear(features, features), nn.Linear(features, features, bias=False)
        self.out = nn.Linear(features, features)

    def forward(self, x, mask=None):
        y = torch.tanh(self.q(x)) * torch.sigmoid(self.k(x))
        return x + self.out(y if mask is None else y * mask), None


class Encoder(nn.Module):
    def __init__(self, features=32, depth=3):
        super().__init__()
        self.enter, self.leave = nn.Linear(8, features), nn.LayerNorm(features)
        self.layers = nn.ModuleList(Block(features) for _ in range(depth))

    def forward(self, x, mask=None):
        x = self.enter(x)
        for layer in self.layers:
            x, _ = layer(x, mask=mask)
        return {"hidden": self.leave(x)}


class Convolution(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.stages = nn.Sequential(nn.Sequential(Convolution(8), Convolution(8)), nn.Sequential(Convolution(8)))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def encoder():
    torch.manual_seed(0)
    return Encoder().eval(), [{"x": torch.randn(2, 12, 8), "mask": torch.rand(2, 12, 1)} for _ in range(4)]


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


def test_input_statistics_of_a_convolution_are_those_of_its_windows():
    """Equation of the layer-wise error: |D * x|^2 of the convolution itself is trace(D H D^T)."""
    from tritkit.methods.blocks import input_rows

    conv, x = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False), torch.randn(2, 3, 9, 9)
    stats = InputStats(27)
    stats.update(input_rows(conv, x))
    with torch.no_grad():
        wanted = float(conv(x).square().sum()) / stats.tokens
    assert stats.output_error(conv.weight.detach().flatten(1)) == pytest.approx(wanted, rel=1e-4)


def test_statistics_see_every_row_and_sample_from_all_over():
    from tritkit.methods.ranges import RangeObserver

    stats, format = InputStats(4), format_of("int8_tensor")
    stats.observers["absmax"] = RangeObserver(format, ("absmax",))
    chunks = [torch.full((1000, 4), float(i)) for i in range(40)]
    chunks[33][617, 2] = -7e4  # beyond float16, and in a row that no sample has
    for chunk in chunks:
        stats.update(chunk)
    assert stats.observers["absmax"].ranges()["absmax"] == (-7e4, 7e4) and stats.largest.max() == 7e4
    rows = stats.rows()
    assert SAMPLE / 2 <= len(rows) <= SAMPLE and set(rows[:, 0].tolist()) == set(range(40))
    wanted = sum(c.double().t() @ c.double() for c in chunks)
    assert torch.allclose(stats.hessian, wanted, rtol=1e-5) and torch.equal(stats.squares, stats.hessian.diagonal())


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


class Jumping(Encoder):
    def forward(self, x):
        x = self.enter(x)
        for layer in self.layers:
            x = 2 * layer(x)[0]
        return x


class Casting(Block):
    def forward(self, x, mask=None):
        y = torch.tanh(self.q(x)) * self.k(x)
        return x + self.out(y.to(self.out.weight.dtype)), None


class CastingEncoder(Encoder):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Casting(32) for _ in range(2))


def test_a_module_that_casts_to_the_dtype_of_weights_is_refused():
    model, x = CastingEncoder().eval(), torch.randn(2, 12, 8)
    wanted = model(x)["hidden"]
    with pytest.raises(ValueError, match=r"a stored linear \(32 x 32, dense\) reads floats, not uint8"):
        quantize(model, "int4_g16", [x])
    assert torch.equal(model(x)["hidden"], wanted)
    rest = Recipe(format="int4_g16"), (Rule(match="*.out", format="keep"),)
    assert len(quantize(model, LoadedRecipe(*rest), [x])["per_linear"]) == 4


@pytest.mark.parametrize(
    ("make", "recipe", "options", "sentence"),
    [
        (Jumping, "int4_g16", {}, "layers.1 does not read what the block before it makes"),
        (Encoder, "int4_g24", {}, "int4_g24 has groups of 24 columns, but a row of layers.0.q has 32"),
        (Encoder, "int4_g16", {"blocks": "layer"}, "Encoder has no list of blocks named 'layer'"),
        (Encoder, "int4_g16", {"blocks": ["layers.7"]}, "Encoder has no block named 'layers.7'"),
        (Encoder, "q4_k_m", {}, "mix is for model folders"),
        (Encoder, "int4_g16", {"overwrite": True}, "overwrite is an option for model folders"),
        (lambda: nn.Linear(8, 8), "int4_g8", {}, "Linear has no repeated blocks with weights"),
        (lambda: Encoder().train(), "int4_g16", {}, "the module is in training"),
    ],
)
def test_mistakes_get_one_sentence(make, recipe, options, sentence):
    model = make()
    if "training" not in sentence:
        model.eval()
    with pytest.raises(ValueError, match=sentence):
        quantize(model, recipe, [torch.randn(2, 12, 8)], **options)


class Adapted(Encoder):
    def __init__(self):
        super().__init__()
        for layer in self.layers:
            layer.adapter = nn.Identity()


@pytest.mark.parametrize(
    ("make", "recipe", "batch", "sentence"),
    [
        (Encoder, {"format": "int4_g16"}, torch.full((2, 12, 8), torch.nan), "layers.0 reads values that are not fin"),
        (Encoder, {"format": "int4_g16"}, torch.zeros(0, 12, 8), r"layers.0 reads an input of shape \(0, 12, 32\)"),
        (
            Encoder,
            {"format": "int8_row", "inputs": "int8_g48"},
            None,
            "int8_g48 has groups of 48 columns, but a row of",
        ),
        (Encoder, {"format": "int4_g16", "range": "entropy"}, None, "in int4_g16 16 weights of layers.0.q share"),
        (Residual, {"format": "int8_row", "inputs": "int8_row"}, None, "share one scale, .* name int8_tensor"),
        (Adapted, {"format": "int4_g16", "correct": "qwt"}, None, "layers.0 has a submodule 'adapter'"),
        (lambda: Encoder().to("meta"), {"format": "int4_g16"}, None, "the module is on meta, but quantising works on"),
    ],
)
def test_what_cannot_be_is_said(make, recipe, batch, sentence):
    batches = [] if batch is None else [batch]
    with pytest.raises(ValueError, match=sentence):
        quantize(make().eval(), read_recipe(None, recipe), batches)


def test_gptq_without_batches_says_so():
    with pytest.raises(ValueError, match="gptq needs calibration data; give batches of inputs"):
        quantize(Encoder().eval(), read_recipe(None, {"format": "int4_g16", "method": "gptq"}))


def llama(use_cache):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=32, use_cache=use_cache,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 8  # attention then is far from uniform
    return model, [torch.randint(0, 50, (16, 16)) for _ in range(4)]


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


def test_a_filled_cache_is_refused():
    model, batches = llama(True)
    with torch.no_grad():
        filled = model(batches[0]).past_key_values
    with pytest.raises(ValueError, match=r"layers.0 is called with keys and values of earlier tokens"):
        quantize(model, "int4_g32", [{"input_ids": batches[0], "past_key_values": filled}])


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


def torch_encoder(layers=2, features=32):
    """Half of its linears are called: nn.MultiheadAttention reads the weights of its own."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(features, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, layers).eval(), [torch.randn(16, 12, features) for _ in range(3)]


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


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("batches", [[], [torch.randn(2, 12, 32)]])
def test_nothing_to_quantise_is_said(batches):
    model = nn.Sequential(Attention(), Attention()).eval()
    with pytest.raises(ValueError, match=r"^0\.attention\.out_proj is never called as a module, nor is any other"):
        quantize(model, "int4_g16", batches)


def parts_of(model):
    """What a module consists of, weights and hooks included."""
    modules = [(name, m, list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in model.named_modules()]
    return modules, [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]


def fails_late(number):
    """A distance that fails at one of its calls."""
    calls = []

    def distance(wanted, found):
        calls.append(0)
        if len(calls) == number:
            raise ZeroDivisionError("late")
        return (wanted - found).square().sum()

    return distance


@pytest.mark.parametrize("failure", ["weights", "judge", "finetune", "store"])
def test_a_module_is_what_it_was_after_an_error(failure, monkeypatch):
    model, batches = torch_encoder(3)
    if failure == "weights":
        model.layers[2].linear2.weight.data[3, 4] = float("nan")
    if failure == "store":
        made = []

        def store(*args):
            made.append(0)
            if len(made) == 4:
                raise ZeroDivisionError("late")
            return StoredLinear(*args)

        monkeypatch.setattr("tritkit.methods.modules.StoredLinear", store)
    distance = fails_late({"judge": 4, "finetune": 8}.get(failure, 0))
    parts, state = parts_of(model), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        before = model(batches[0])
    recipe = Recipe(format="int3_g16", inputs="int8_row", correct="qwt", qwt=QwtOptions(check=True, finetune=1))
    with pytest.raises((ValueError, ZeroDivisionError), match=r"layers\.2\.linear2\.weight|late"):
        quantize(model, LoadedRecipe(recipe), batches, distance=distance)
    assert parts_of(model) == parts and model.state_dict().keys() == state.keys()
    assert all(torch.equal(v.nan_to_num(), state[k].nan_to_num()) for k, v in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(batches[0]).nan_to_num(), before.nan_to_num())
    assert model.use_nested_tensor and all(block.activation_relu_or_gelu for block in model.layers)


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


def test_one_sample_is_too_few():
    model, _ = encoder()
    with pytest.raises(ValueError, match=r"qwt needs at least two samples, .* the only batch has 1"):
        quantize(model, LoadedRecipe(Recipe(format="int4_g16", correct="qwt")), [torch.randn(1, 12, 8)])


def test_some_batches_stay_for_fitting():
    model, batches = encoder()
    recipe = Recipe(format="int3_g16", correct="qwt", qwt=QwtOptions(held_out=0.99))
    assert quantize(model, LoadedRecipe(recipe), batches[:2])["adapters"]


def test_statistics_without_pairs_know_the_same_but_the_error_of_a_sample():
    """Of some 2048 rows: the error of their mean is a few per cent."""
    torch.manual_seed(0)
    rows = torch.randn(6000, 24) * torch.linspace(0.1, 3, 24)
    whole, part = InputStats(24), InputStats(24, paired=False)
    for stats in (whole, part):
        for chunk in rows.split(1000):
            stats.update(chunk)
    assert torch.allclose(whole.second_moment, part.second_moment, rtol=1e-5) and part.hessian.numel() == 0
    difference = torch.randn(8, 24)
    assert part.output_error(difference) == pytest.approx(whole.output_error(difference), rel=0.05)


class InPlace(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.fc = nn.Linear(features, features)

    def forward(self, x):
        x += torch.tanh(self.fc(x))
        return x


class Chain(nn.Module):
    """Blocks that run in an order of their own."""

    def __init__(self, blocks, order=None):
        super().__init__()
        self.layers, self.order = nn.ModuleList(blocks), order or range(len(blocks))

    def forward(self, x):
        for number in self.order:
            x = self.layers[number](x)
        return x


def test_a_block_that_writes_over_its_input_is_refused():
    model = Chain([InPlace(16) for _ in range(2)]).eval()
    with pytest.raises(ValueError, match=r"layers.0 writes over its input, which is needed afterwards; let it work on"):
        quantize(model, Recipe(format="int4_g16", correct="qwt"), [torch.randn(4, 16) for _ in range(3)])


def test_blocks_are_named_in_their_order():
    for order, names, sentence in (
        ((1, 0, 2), None, r"layers.1 is called first, layers.0 next; name them with blocks= in"),
        ((0, 1), None, r"layers.2 is not called"),
        ((0, 1, 2), ["layers.0", "layers.2", "layers.1"], "these blocks are not in sequence|called first"),
    ):
        model = Chain([nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)], order).eval()
        with pytest.raises(ValueError, match=sentence):
            quantize(model, "int4_g16", [torch.randn(4, 16)], blocks=names or "layers")


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


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("padding", ["same", "valid", (2, 1)])
def test_rows_of_a_convolution_are_what_it_multiplies(padding, mode):
    conv = nn.Conv2d(3, 5, (3, 4), padding=padding, padding_mode=mode)
    x = torch.randn(2, 3, 8, 9)
    rows = input_rows(conv, x)
    y = conv(x)
    found = (rows @ matrix_of(conv).t() + conv.bias).reshape(2, *y.shape[2:], 5).movedim(-1, 1)
    torch.testing.assert_close(found, y, rtol=1e-4, atol=1e-5)


def test_what_a_layout_cannot_hold_is_said_with_its_name():
    model = Chain([nn.Sequential(nn.Linear(12, 12)) for _ in range(2)]).eval()
    with pytest.raises(ValueError, match=r"^layers.0.0: binary_rows packs eight columns in a byte, but a row has 12"):
        quantize(model, "binary", blocks="layers")
    with pytest.raises(ValueError, match=r"layers.0.0 is a linear itself, but a block is a module that holds some"):
        quantize(model, "binary", blocks="layers.0")


def test_options_of_folders_and_modules_do_not_mix(tmp_path):
    with pytest.raises(ValueError, match=r"blocks is an option for modules, but .* is a model folder"):
        quantize(tmp_path / "model", "int4_g32", out=tmp_path / "q", blocks="layers")
    for batches, kind in ((torch.randn(2, 8), "Tensor"), ({"x": torch.randn(2, 8)}, "dict"), ("wiki.txt", "str")):
        with pytest.raises(ValueError, match=f"batches is one {kind}; give a list of batches"):
            quantize(Encoder().eval(), "int4_g16", batches)

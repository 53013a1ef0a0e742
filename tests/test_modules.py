"""quantize(module, recipe, batches): modules that are not ours, in place."""

import pytest
import torch
from torch import nn

from tritkit import quantize
from tritkit.formats import format_of
from tritkit.methods.modules import blocks_of
from tritkit.methods.recipe import read_recipe
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
    from tritkit.methods.stats import InputStats

    conv, x = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False), torch.randn(2, 3, 9, 9)
    stats = InputStats(27)
    stats.update(input_rows(conv, x))
    with torch.no_grad():
        wanted = float(conv(x).square().sum()) / stats.tokens
    assert stats.output_error(conv.weight.detach().flatten(1)) == pytest.approx(wanted, rel=1e-4)


def test_statistics_see_every_row_and_sample_from_all_over():
    from tritkit.methods.ranges import RangeObserver
    from tritkit.methods.stats import SAMPLE, InputStats

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
    assert torch.allclose(stats.hessian, wanted, rtol=1e-5)


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


def test_gptq_without_batches_says_so():
    with pytest.raises(ValueError, match="gptq needs calibration data"):
        quantize(Encoder().eval(), read_recipe(None, {"format": "int4_g16", "method": "gptq"}))

"""What cannot be quantised is said in one sentence, and a module is then what it was."""

import pytest
import torch
from module_models import Chain, Encoder, Residual, encoder, llama, torch_encoder
from torch import nn

from tritkit import quantize
from tritkit.methods.recipe import LoadedRecipe, QwtOptions, Recipe, read_recipe
from tritkit.methods.swap import Swap
from tritkit.stored import StoredLinear


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
        (lambda: nn.Linear(8, 8), "int4_g8", {}, "Linear has no repeated blocks that hold linears; name"),
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


def test_a_filled_cache_is_refused():
    model, batches = llama(True)
    with torch.no_grad():
        filled = model(batches[0]).past_key_values
    with pytest.raises(ValueError, match=r"layers.0 is called with keys and values of earlier tokens"):
        quantize(model, "int4_g32", [{"input_ids": batches[0], "past_key_values": filled}])


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
        made, replace = [], Swap._replace

        def store(*args):
            made.append(0)
            if len(made) == 4:
                raise ZeroDivisionError("late")
            replace(*args)

        monkeypatch.setattr(Swap, "_replace", store)
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


def test_one_sample_is_too_few():
    model, _ = encoder()
    with pytest.raises(ValueError, match=r"qwt needs at least two samples, .* the only batch has 1"):
        quantize(model, LoadedRecipe(Recipe(format="int4_g16", correct="qwt")), [torch.randn(1, 12, 8)])


class InPlace(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.fc = nn.Linear(features, features)

    def forward(self, x):
        x += torch.tanh(self.fc(x))
        return x


def test_a_block_that_writes_over_its_input_is_refused():
    model = Chain([InPlace(16) for _ in range(2)]).eval()
    for mode in (False, True):  # in which tensors do not count what is written to them
        with (
            torch.inference_mode(mode),
            pytest.raises(ValueError, match=r"layers.0 writes over its input, which is need"),
        ):
            quantize(model, Recipe(format="int4_g16", correct="qwt"), [torch.randn(4, 16) for _ in range(3)])


def test_blocks_are_named_in_their_order():
    for order, names, sentence in (
        ((1, 0, 2), None, r"layers.1 runs where layers.0 is named; name them with blocks= in"),
        ((0, 1), None, r"layers.2 is not called"),
        ((0, 1, 2), ["layers.0", "layers.2", "layers.1"], "these blocks are not in sequence|runs where"),
    ):
        model = Chain([nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)], order).eval()
        with pytest.raises(ValueError, match=sentence):
            quantize(model, "int4_g16", [torch.randn(4, 16)], blocks=names or "layers")


def test_what_a_layout_cannot_hold_is_said_with_its_name():
    model = Chain([nn.Sequential(nn.Linear(12, 12)) for _ in range(2)]).eval()
    with pytest.raises(ValueError, match=r"^layers.0.0: binary_rows packs eight columns in a byte, but a row has 12"):
        quantize(model, "binary", blocks="layers")
    with pytest.raises(ValueError, match=r"layers.0.0 is a linear itself, but a block is a module that holds some"):
        quantize(model, "binary", blocks="layers.0")


def test_a_folder_goes_the_same_way(tmp_path, text_file):
    """quantize() of a folder is quantize_folder(), with paths as they come."""
    from float_folder import a_folder

    from tritkit.methods.quantizer import quantize_folder

    source, options = a_folder(tmp_path / "model", vocab_size=4096), {"sequences": 2, "length": 32}
    metrics = quantize(source, "q4_0", [text_file], out=tmp_path / "one", **options)
    again = quantize_folder(str(source), tmp_path / "two", "q4_0", str(text_file), **options)
    assert metrics["types"] == again["types"] and metrics["calibration_sequences"] == 2
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert written[0] == written[1]


def test_options_of_folders_and_modules_do_not_mix(tmp_path):
    with pytest.raises(ValueError, match=r"blocks is an option for modules, but .* is a model folder"):
        quantize(tmp_path / "model", "int4_g32", out=tmp_path / "q", blocks="layers")
    for batches, kind in ((torch.randn(2, 8), "Tensor"), ({"x": torch.randn(2, 8)}, "dict"), ("wiki.txt", "str")):
        with pytest.raises(ValueError, match=f"batches is one {kind}; give a list of batches"):
            quantize(Encoder().eval(), "int4_g16", batches)


def test_what_holds_no_linears_is_named():
    model, x = Chain([nn.Sequential(nn.Conv1d(4, 4, 3, padding=1)) for _ in range(2)]).eval(), torch.randn(2, 4, 8)
    for blocks in (None, "layers"):
        with pytest.raises(ValueError, match=r"hold (no )?linears, their weights are in Conv1d"):
            quantize(model, "int4_g16", [x], blocks=blocks)
    model, batches = encoder()
    quantize(model, "int4_g16", batches)
    for blocks in (None, "layers"):
        with pytest.raises(ValueError, match="linears, they are quantised already"):
            quantize(model, "int4_g16", batches, blocks=blocks)


class Towers(nn.Module):
    """Two encoders of one class, side by side."""

    def __init__(self):
        super().__init__()
        self.left, self.right = Encoder(), Encoder()

    def forward(self, x):
        return self.left(x)["hidden"] * self.right(x)["hidden"]


def test_two_towers_are_quantised_one_after_the_other():
    model, x = Towers().eval(), torch.randn(2, 12, 8)
    with pytest.raises(ValueError, match=r"right.layers.0 does not read .* not in sequence; name those of one part"):
        quantize(model, "int4_g16", [x])
    found = [quantize(model, "int4_g16", [x], blocks=f"{side}.layers") for side in ("left", "right")]
    assert [len(report["per_linear"]) for report in found] == [9, 9]
    assert all(isinstance(m, StoredLinear) for layer in model.right.layers for m in (layer.q, layer.k, layer.out))

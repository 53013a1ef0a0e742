"""Latent to packed: the codes of training, nothing lost on the way, refusal of what packed weights cannot run."""

import json

import numpy as np
import pytest
import torch

from tritkit import results
from tritkit.checkpoint import open_folder
from tritkit.formats import format_of
from tritkit.models.shapes import linear_names
from tritkit.pack import pack


@pytest.mark.parametrize("kind", ["b158", "b1"])
def test_codes_are_those_of_training(make_folder, tmp_path, kind):
    latent = open_folder(make_folder(kind))
    pack(latent.path, tmp_path / "packed")
    packed = open_folder(tmp_path / "packed")
    format = format_of(latent.config.weights)
    for name in linear_names(latent.config):
        q = format.quantize(torch.from_numpy(latent.tensors[f"{name}.weight"].float32()))
        got = packed.codes(name)
        assert np.array_equal(got.codes, q.codes.reshape(q.shape).numpy())
        assert got.scale.item() == q.grid.scale.item()
    bits = {"b158": 2, "b1": 1}[kind]
    assert bits < packed.bits_per_weight() < bits * 1.02
    assert packed.parameters() == latent.parameters()


def test_the_model_itself_is_never_replaced(make_folder):
    folder = make_folder("b158")
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    with pytest.raises(ValueError, match="give another folder"):
        pack(folder, folder.parent / "." / folder.name, overwrite=True)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_only_what_training_measured_is_taken_over(make_folder, tmp_path):
    folder = make_folder("b158")
    results.record(folder, "train", {}, {"val_loss": 3.0})
    results.record(folder, "bench", {}, {"native_decode_rate": 5.0})
    pack(folder, tmp_path / "packed")
    metrics = results.latest(tmp_path / "packed")
    assert metrics["val_loss"] == 3.0 and "native_decode_rate" not in metrics
    assert f'parent = "{folder}"' in (tmp_path / "packed" / "tritkit.toml").read_text()


def test_activations_that_packed_weights_cannot_run(make_folder, tmp_path):
    folder = make_folder("b158")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "tritkit", "weights": "ternary", "activations": "int7_row_asym"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="int7_row_asym"):
        pack(folder, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("weights", ["ternary", "binary"])
@pytest.mark.parametrize("family", ["llama", "bitnet"])
def test_every_family_in_every_format_opens_again(family, weights, tmp_path, tokenizer):
    from tritkit.engine.load import load
    from tritkit.models.config import ModelConfig
    from tritkit.models.transformer import build
    from tritkit.trainstate import save_model

    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = ModelConfig(family=family, weights=weights, activations="a8", **sizes)
    save_model(tmp_path / "m", build(config, seed=0), config, tokenizer)
    pack(tmp_path / "m", tmp_path / "p")
    for folder in ("m", "p"):
        opened = open_folder(tmp_path / folder)
        assert (opened.config.family, opened.config.weights) == (family, weights)
        assert load(tmp_path / folder).engine.vocab_size == 320


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantization_config": ["x"]}, "expected an object"),
        ({"quantization_config": {"quant_method": "tritkit", "weights": "ternary", "layout": "zip"}}, "layout 'zip'"),
        ({"quantization_config": {"quant_method": "awq"}}, "'awq'"),
    ],
)
def test_odd_configs_are_refused(make_folder, change, words):
    folder = make_folder("b158")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        open_folder(folder)

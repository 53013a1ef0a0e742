"""What a folder says of inputs and adapters: read, written, measured, and refused where it is odd."""

import json

import numpy as np
import pytest
from mixed import WIDE, mixed

from tritkit.checkpoint import open_folder
from tritkit.folderwriter import quantization_config
from tritkit.gguf_export import export_gguf
from tritkit.hf_export import export_hf
from tritkit.inputs import InputFormat, input_format
from tritkit.models.shapes import linear_names, linear_shape

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def source(make_folder):
    return make_folder("llama", **WIDE)


def test_names_mean_what_the_formats_are():
    from tritkit.formats import format_of

    for name in ("int8_row", "int4_row_asym", "int8", "int8_g32", "int6_tensor", "a8", "a8_q128", "a4", "a8_g32"):
        found, format = input_format(name), format_of(name)
        assert (found.group, found.is_asymmetric) == (format.group, format.has_offset)
        assert 2**found.bits >= format.hi - format.lo + 1 > 2 ** (found.bits - 1)
    assert input_format("int8_row+outliers") == InputFormat("int8_row", 8, "row", has_outliers=True)
    assert input_format("int8_tensor").is_static and not input_format("int8_g32").is_static


@pytest.mark.parametrize("name", ["int9_row", "int8_gx", "a9", "", "ternary", "int8_g0", "int8_tensor+outliers",
                                  "int8_row_asym+outliers", "nf4"])  # fmt: skip
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="inputs cannot be"):
        input_format(name)


def test_what_is_written_is_read(source, tmp_path):
    folder = mixed(source, tmp_path / "m", ["int8_row"], ["int8_row", "int8_tensor_asym", "int8_row+outliers"], (0, 1))
    found = open_folder(folder)
    names = linear_names(found.config)
    assert found.inputs == {
        n: ("int8_row", "int8_tensor_asym", "int8_row+outliers")[i % 3] for i, n in enumerate(names)
    }
    assert (found.adapters, found.outlier_threshold) == ((0, 1), 6.0)
    scale, zero = found.input_grid(names[1])
    assert scale == found.tensors[f"{names[1]}.input_scale"].array[0] and zero == int(zero)
    assert found.input_grid(names[0]) is None
    q = found.hf["quantization_config"]
    assert q == quantization_config(found.config, found.layouts, found.inputs, found.adapters)
    assert q["quant_method"] == "tritkit" and q["weights"] is None


def test_a_folder_of_floats_may_have_adapters(source, tmp_path):
    found = open_folder(mixed(source, tmp_path / "m", None, adapters=(1,)))
    assert found.adapters == (1,) and not found.layouts and found.hf["model_type"] == "tritkit_llama"


def test_bits_per_weight_count_scales_and_adapters(source, tmp_path):
    plain = open_folder(mixed(source, tmp_path / "a", ["int8_row"]))
    weights = sum(np.prod(linear_shape(plain.config, n)) for n in linear_names(plain.config))
    rows = sum(linear_shape(plain.config, n)[0] for n in linear_names(plain.config))
    headers = 4 * len(linear_names(plain.config))
    assert plain.bits_per_weight() == pytest.approx(8 * (weights + 4 * rows + headers) / weights)
    more = open_folder(mixed(source, tmp_path / "b", ["int8_row"], ["int8_tensor"], (0,)))
    added = 256 * 256 * 2 + 256 * 4 + 4 * len(linear_names(plain.config))
    assert more.bits_per_weight() - plain.bits_per_weight() == pytest.approx(8 * added / weights)


def test_containers_that_cannot_hold_them_refuse(source, tmp_path):
    adapted = open_folder(mixed(source, tmp_path / "a", ["q8_0"], adapters=(0,)))
    rounded = open_folder(mixed(source, tmp_path / "b", ["q8_0"], ["int8_row"]))
    for out, write in (("x.gguf", export_gguf), ("x", lambda model, out: export_hf(model, out, "bf16"))):
        with pytest.raises(ValueError, match=r"has adapters in 1 layers, which .* cannot hold"):
            write(adapted, tmp_path / out)
        with pytest.raises(ValueError, match=r"rounds the inputs of 14 linears to int8_row, which .* cannot say"):
            write(rounded, tmp_path / out)
        assert not (tmp_path / out).exists()


def test_inspect_tells_of_them(source, tmp_path):
    from tritkit.inspection import inspect

    found = inspect(mixed(source, tmp_path / "m", ["int4_g32"], ["int8_row", "int8_tensor"], (0,)))
    assert "7 linears round their inputs to int8_tensor" in found["odd"]
    assert "1 of 2 layers have an adapter: y = layer(x) + W x + b" in found["odd"]
    assert not any(line.startswith("export") for line in found["can"]) and "native" in found["can"][0]
    (linears,) = (row for row in found["matrices"] if row["place"] == "linears")
    assert 4.5 < linears["bits_per_weight"] < 4.51  # codes, float16 scales, headers
    outliers = inspect(mixed(source, tmp_path / "o", ["int8_row"], ["int8_row+outliers"]))
    assert "--engine torch" in outliers["can"][0]


ODD = [
    ({"inputs": {Q: "int9_row"}}, r"q_proj: inputs cannot be 'int9_row'; known are"),
    ({"inputs": {"model.layers.9.self_attn.q_proj": "int8_row"}}, "which is no linear of this model's layers"),
    ({"inputs": {"lm_head": "int8_row"}}, "has inputs for 'lm_head', which is no linear"),
    ({"inputs": [Q]}, "expected a table of formats by linear"),
    ({"inputs": {Q: 8}}, "has inputs 8 for model.layers.0.self_attn.q_proj, expected the name of a format"),
    ({"inputs": {Q: "int8_g48"}}, "inputs int8_g48 for .*q_proj, which has 256 columns"),
    ({"inputs": {Q: "int8_tensor"}}, "has no tensor .*q_proj.input_scale, which inputs of the format int8_tensor need"),
    ({"inputs": {Q: "int8_row+outliers"}}, r"inputs int8_row\+outliers for .*q_proj, whose weights have not one scale"),
    ({"layouts": {}, "inputs": {Q: "int8_row"}}, "inputs int8_row for .*q_proj, whose weights are floats"),
    ({"adapters": [2]}, "an adapter of layer 2, but the layers are 0 to 1"),
    ({"adapters": [True]}, "expected a list of layer numbers"),
    ({"adapters": {"0": 1}}, "expected a list of layer numbers"),
    ({"adapters": [0, 0]}, "several adapters for one layer"),
    ({"adapters": [1]}, "has no tensor model.layers.1.adapter.weight, but config.json names its layer in adapters"),
    ({"adapters": []}, "has a tensor model.layers.0.adapter.weight, which config.json says nothing of"),
    ({"outlier_threshold": 0}, "outlier_threshold 0, expected a number above 0"),
]


@pytest.mark.parametrize(("change", "message"), ODD)
def test_odd_configs_are_refused(source, tmp_path, change, message):
    folder = mixed(source, tmp_path / "m", ["q8_0"], adapters=(0,))
    hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    hf["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(hf), encoding="utf-8")
    if change.get("layouts") == {}:
        message = f"{message}|has the shape"
    with pytest.raises(ValueError, match=message):
        open_folder(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("input_scale", np.array([np.inf], np.float32), "should be a finite number above 0, but it is inf"),
        ("input_scale", np.array([0], np.float32), "should be a finite number above 0, but it is 0"),
        ("input_scale", np.ones(2, np.float32), r"is F32 \(2,\), expected one number"),
        ("input_zero", np.array([256], np.float32), "should be a whole number of 0 to 255, but it is 256"),
        ("input_zero", np.array([0.5], np.float32), "should be a whole number of 0 to 255, but it is 0.5"),
    ],
)
def test_odd_grids_are_refused(source, tmp_path, monkeypatch, key, value, message):
    from tritkit.tensorfile import StoredTensor

    def odd(name, kind, chance):
        tensors = {"input_scale": np.ones(1, np.float32), "input_zero": np.full(1, 3, np.float32)} | {key: value}
        return {f"{name}.{k}": StoredTensor("F32", v) for k, v in tensors.items()}

    monkeypatch.setattr("mixed.static_grid", odd)
    with pytest.raises(ValueError, match=message):
        open_folder(mixed(source, tmp_path / "m", ["int8_row"], ["int8_tensor_asym"]))


def test_low_bit_linears_have_activations_of_their_own(make_folder, tmp_path):
    from tritkit.pack import pack

    pack(make_folder("b1"), tmp_path / "packed")
    hf = json.loads((tmp_path / "packed" / "config.json").read_text(encoding="utf-8"))
    hf["quantization_config"]["inputs"] = {Q: "int8_row"}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(hf), encoding="utf-8")
    with pytest.raises(ValueError, match="whose activations are a8_q128 already"):
        open_folder(tmp_path / "packed")

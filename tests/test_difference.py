"""diff: what it calls equal, rounded, requantised, different, missing."""

import json

import numpy as np
import pytest

from tritkit.checkpoint import open_folder
from tritkit.cli import main
from tritkit.difference import differences
from tritkit.gguf_export import export_gguf
from tritkit.gguf_model import open_gguf
from tritkit.hf_export import export_hf
from tritkit.models.shapes import linear_names
from tritkit.pack import pack
from tritkit.tensorfile import StoredTensor, TensorFile, write_tensors

WIDE = {"hidden_size": 256, "intermediate_size": 512}


def changed(folder, out, name, change):
    """A copy of the folder with one tensor changed."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    tensors = {n: StoredTensor(t.dtype, t.array.copy()) for n, t in TensorFile(folder / "model.safetensors").items()}
    change(tensors[name].array)
    write_tensors(out / "model.safetensors", tensors, {})
    return out


def test_one_value_is_seen_and_named(make_folder, tmp_path, capsys):
    folder = make_folder("llama")
    name = "model.layers.1.mlp.up_proj.weight"

    def change(array):
        array[2, 3] += 0.5

    other = changed(folder, tmp_path / "other", name, change)
    assert main(["diff", str(folder), str(other), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [t["name"] for t in found["tensors"]] == [name]
    assert found["tensors"][0]["status"] == "different"
    assert found["tensors"][0]["largest"] == pytest.approx(0.5, abs=1e-6)
    assert main(["diff", str(folder), str(folder)]) == 0
    assert "The same weights" in capsys.readouterr().out


def test_a_code_that_flipped_is_no_rounding(make_folder, tmp_path):
    pack(make_folder("b158", **WIDE), tmp_path / "packed")

    def change(array):
        row, column = np.argwhere(array & 3 != 1)[0]
        array[row, column] ^= 2  # -1 becomes +1, or the other way

    name = "model.layers.0.self_attn.q_proj.weight"
    other = changed(tmp_path / "packed", tmp_path / "other", name, change)
    found = {d.name: d.status for d in differences(open_folder(tmp_path / "packed"), open_folder(other))}
    assert found[name] == "different"
    assert {s for n, s in found.items() if n != name} == {"equal"}


def test_rounding_of_scales_and_of_types_have_names_of_their_own(make_folder, tmp_path, capsys):
    pack(make_folder("b158", **WIDE), tmp_path / "packed", "float32")
    packed = open_folder(tmp_path / "packed")
    export_gguf(packed, tmp_path / "x.gguf", "tq2_0")  # float16 scales; the embedding becomes Q8_0
    found = {d.name: d for d in differences(packed, open_gguf(tmp_path / "x.gguf"))}
    assert {found[f"{n}.weight"].status for n in linear_names(packed.config)} == {"rounded"}
    assert all(0 < found[f"{n}.weight"].relative < 2**-11 for n in linear_names(packed.config))
    assert found["model.embed_tokens.weight"].status == "requantised"
    assert found["model.embed_tokens.weight"].forms == ("f32", "q8_0")
    assert main(["diff", str(tmp_path / "packed"), str(tmp_path / "x.gguf")]) == 1
    assert "The same weights, some requantised" in capsys.readouterr().out
    export_hf(packed, tmp_path / "bf16", "bf16")
    found = {d.name: d.status for d in differences(packed, open_folder(tmp_path / "bf16"))}
    assert set(found.values()) <= {"rounded", "equal"} and "rounded" in found.values()


def test_other_shapes_and_names_are_different_and_missing(make_folder, capsys):
    a, b = make_folder("llama"), make_folder("b158", hidden_size=32, intermediate_size=64)
    found = {d.name: d for d in differences(open_folder(a), open_folder(b))}
    assert found["model.embed_tokens.weight"].status == "different"
    assert np.isinf(found["model.embed_tokens.weight"].largest)
    assert found["model.layers.0.self_attn.attn_sub_norm.weight"].status == "missing"
    assert main(["diff", str(a), str(b)]) == 1

"""compressed-tensors' pack-quantized folders, there and back; its own package and transformers as the truth."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from integer_folder import integer_folder, stored

from tritkit.checkpoint import open_folder
from tritkit.engine import Job
from tritkit.engine.load import load
from tritkit.engine.torch import model_of
from tritkit.folderwriter import float_to_bf16
from tritkit.formats import format_of
from tritkit.hf_export import export_hf
from tritkit.importer import import_model
from tritkit.layouts import LAYOUTS, Packed, Unpacked
from tritkit.layouts.compressed import PackQuantized
from tritkit.methods.rtn import unpacked
from tritkit.models.shapes import linear_names
from tritkit.tensorfile import StoredTensor, TensorFile, write_tensors

UP = "model.layers.0.mlp.up_proj"
SAME_MODE = 1e-4  # float32, same operations: only the order of sums differs


def matrix(format: str, seed: int = 0, shape=(48, 96)) -> Unpacked:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.3
    return unpacked(format_of(format).quantize(w))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", ["g32", "row", "g32_asym", "row_asym", "tensor"])
def test_pack_and_unpack_is_the_identity(bits, kind):
    """Also bit by bit: code i of a row, plus half the range, lies at bit i * bits of the row's words."""
    m, layout = matrix(f"int{bits}_{kind}"), PackQuantized(bits)
    packed = layout.pack(m)
    back = layout.unpack(packed, m.codes.shape)
    scale = np.broadcast_to(m.scale, (48, m.scale.shape[1]))
    assert np.array_equal(back.codes, m.codes) and np.array_equal(back.scale, scale)
    assert (back.offset is None) == (m.offset is None)
    assert back.offset is None or np.array_equal(back.offset, m.offset)
    half = 0 if m.offset is not None else 1 << bits - 1
    words = packed.arrays["weight_packed"]
    assert words.dtype == np.int32 and packed.arrays["weight_shape"].tolist() == [48, 96]
    number = sum(int(word) << 32 * i for i, word in enumerate(words[7].view(np.uint32)))
    assert [number >> bits * i & (1 << bits) - 1 for i in range(96)] == (m.codes[7] + half).tolist()
    if m.offset is not None:
        zero = packed.arrays["weight_zero_point"]
        number = sum(int(word) << 32 * i for i, word in enumerate(np.ascontiguousarray(zero[:, 0]).view(np.uint32)))
        found = [number >> bits * i & (1 << bits) - 1 for i in range(48)]
        assert found == np.rint(-m.offset / m.scale)[:, 0].tolist()


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", ["g32", "row", "g32_asym", "row_asym"])
def test_their_package_packs_and_unpacks_the_same(bits, kind):
    """compress and decompress of compressed-tensors itself, of weights that lie on the grid."""
    theirs = pytest.importorskip("compressed_tensors.compressors.pack_quantized", exc_type=ImportError)
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    m, layout = matrix(f"int{bits}_{kind}", shape=(50, 96)), PackQuantized(bits)
    strategy = {"strategy": "channel"} if "row" in kind else {"strategy": "group", "group_size": 32}
    weights = QuantizationArgs(num_bits=bits, symmetric=m.offset is None, **strategy)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    ours = layout.pack(m).arrays
    state = {name: torch.from_numpy(array.copy()) for name, array in ours.items()}
    state["weight_scale"] = state["weight_scale"].float()
    values = theirs.PackedQuantizationCompressor.decompress(state, scheme)["weight"].numpy()
    zero = np.float32(0) if m.offset is None else np.rint(-m.offset / m.scale)[..., None]
    wanted = (m.codes.reshape(50, m.scale.shape[1], -1) - zero) * m.scale[..., None]
    assert np.array_equal(values, wanted.reshape(50, 96))
    state = {"weight": torch.from_numpy(values.copy()), "weight_scale": torch.from_numpy(m.scale.copy())}
    if m.offset is not None:
        state["weight_zero_point"] = torch.from_numpy((zero[..., 0] - (1 << bits - 1)).astype(np.int8))
    again = theirs.PackedQuantizationCompressor.compress(state, scheme)
    for name in ("weight_packed", "weight_shape", *(["weight_zero_point"] if m.offset is not None else [])):
        assert np.array_equal(again[name].numpy(), ours[name]), name
    back = layout.unpack(Packed({name: array.numpy() for name, array in again.items()}), (50, 96))
    assert np.array_equal(back.codes, m.codes)


FOLDERS = {
    "int4_g32": {},
    "int3_g16_asym": {},
    "int8_row": {},
    "int5_row_asym": {},
    "int4_g16": {"down_proj": "int8_row", "layers.1.self_attn": "int6_g32_asym"},
}


@pytest.fixture(params=FOLDERS)
def folders(request, make_folder, tmp_path):
    """(ours, theirs): a folder of integers and what it was exported to."""
    source = integer_folder(make_folder("llama"), tmp_path / "q", request.param, **FOLDERS[request.param])
    report = export_hf(open_folder(source), tmp_path / "out", "compressed-tensors")
    assert report["types"]["compressed-tensors"] == 14 and report["notes"] == []
    return source, tmp_path / "out"


def test_folders_there_and_back(folders):
    ours, theirs = map(open_folder, folders)
    assert theirs.container == "compressed-tensors"
    for name in linear_names(ours.config):
        a, b = ours.codes(name), theirs.codes(name)
        assert np.array_equal(a.codes, b.codes) and np.array_equal(a.scale, b.scale), name
        assert (a.offset is None and b.offset is None) or np.array_equal(a.offset, b.offset)
        assert all(np.array_equal(x, theirs.packed(name).arrays[key]) for key, x in ours.packed(name).arrays.items())


def test_config_says_what_each_linear_is(folders):
    q = json.loads((folders[1] / "config.json").read_text())["quantization_config"]
    assert (q["quant_method"], q["format"], q["quantization_status"]) == (
        "compressed-tensors",
        "pack-quantized",
        "compressed",
    )
    ours = open_folder(folders[0])
    for name in linear_names(ours.config):
        (group,) = [g for g in q["config_groups"].values() if name in g["targets"] or g["targets"] == ["Linear"]]
        arrays = ours.packed(name).arrays
        groups = arrays["weight_scale"].shape[1]
        assert group["weights"]["num_bits"] == arrays["weight_code"][0]
        assert group["weights"]["symmetric"] is ("weight_zero" not in arrays)
        size = open_folder(folders[0]).codes(name).codes.shape[1] // groups
        assert group["weights"]["group_size"] == (None if groups == 1 else size)
        assert group["weights"]["strategy"] == ("channel" if groups == 1 else "group")


THEIRS = """
import sys
import numpy as np, torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
tokens = torch.from_numpy(np.load(sys.argv[1]))
for folder, lazily in zip(sys.argv[2::2], sys.argv[3::2]):
    how = {} if lazily == "lazily" else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **how).eval()
    with torch.no_grad():
        np.save(folder + "/logits.npy", model(tokens).logits.numpy())
"""


@pytest.mark.interop
def test_transformers_gives_the_same_logits(make_folder, tmp_path):
    """Asymmetric weights by dequantize=True, since compressed-tensors 0.20 gives the module that it unpacks on the
    first call a zero point of another shape; there it makes weights in float16, the dtype of the scales of groups."""
    pytest.importorskip("compressed_tensors", exc_type=ImportError)
    kinds = {"int4_g32": "lazily", "int8_row": "lazily", "int5_row_asym": "at once", "int4_g16": "lazily"}
    for format in kinds:
        source = integer_folder(make_folder("llama"), tmp_path / "q" / format, format, **MIXED.get(format, {}))
        export_hf(open_folder(source), tmp_path / format, "compressed-tensors")
    tokens = np.random.default_rng(0).integers(0, 320, (2, 40))
    np.save(tmp_path / "tokens.npy", tokens)
    pairs = [part for format, how in kinds.items() for part in (str(tmp_path / format), how)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", THEIRS, str(tmp_path / "tokens.npy"), *pairs],
        capture_output=True,
        text=True,
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert not done.returncode, done.stderr[-2000:]
    for format in kinds:
        with torch.no_grad():
            ours = model_of(open_folder(tmp_path / format)).eval()(torch.from_numpy(tokens))
        assert np.abs(np.load(tmp_path / format / "logits.npy") - ours.numpy()).max() < SAME_MODE, format


MIXED = {"int4_g16": {"down_proj": "int8_row", "layers.1.self_attn": "int6_g32"}}


def changed(folder, **tensors):
    """Replace or (None) drop tensors of a linear."""
    path = folder / "model.safetensors"
    found = {key: stored(np.array(t.array)) for key, t in TensorFile(path).items()}
    for name, array in tensors.items():
        found.pop(f"{UP}.{name}", None)
        if array is not None:
            found[f"{UP}.{name}"] = stored(array)
    write_tensors(path.with_suffix(".new"), found, {})
    path.with_suffix(".new").replace(path)


@pytest.fixture
def folder(make_folder, tmp_path):
    source = integer_folder(make_folder("llama"), tmp_path / "q", "int4_g32")
    export_hf(open_folder(source), tmp_path / "ct", "compressed-tensors")
    return tmp_path / "ct"


def test_an_imported_folder_computes_the_same(folder, tmp_path):
    import_model(folder, tmp_path / "imported")
    ours, theirs, parent = (open_folder(tmp_path / name) for name in ("imported", "ct", "q"))
    assert ours.container == "folder"
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        found = [model_of(f)(tokens) for f in (ours, theirs, parent)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_scales_in_bfloat16_are_kept(folder):
    """As llm-compressor writes them for models in bfloat16; float16 holds such numbers down to 2^-17."""
    path = folder / "model.safetensors"
    found = {key: stored(np.array(t.array)) for key, t in TensorFile(path).items()}
    raw = float_to_bf16(found[f"{UP}.weight_scale"].float32())
    found[f"{UP}.weight_scale"] = StoredTensor("BF16", raw)
    write_tensors(path.with_suffix(".new"), found, {})
    path.with_suffix(".new").replace(path)
    assert np.array_equal(open_folder(folder).codes(UP).scale, StoredTensor("BF16", raw).float32())


def test_scales_in_float32_are_kept(folder, tmp_path):
    """As they are where the model was in float32: beside groups, with more digits than float16 has, and below it."""
    path, chance = folder / "model.safetensors", np.random.default_rng(0)
    found = {key: stored(np.array(t.array)) for key, t in TensorFile(path).items()}
    scale = (10.0 ** chance.uniform(-12, -1, found[f"{UP}.weight_scale"].array.shape)).astype(np.float32)
    found[f"{UP}.weight_scale"] = stored(scale)
    write_tensors(path.with_suffix(".new"), found, {})
    path.with_suffix(".new").replace(path)
    assert np.array_equal(open_folder(folder).codes(UP).scale, scale)
    engines = [load(folder, engine, 1).engine for engine in ("native", "torch")]
    native, torch_ = (e.step([Job(e.new(), np.arange(20, dtype=np.int32), "all")])[0] for e in engines)
    assert np.abs(native - torch_).max() < 0.05 * np.abs(torch_).max()
    export_hf(open_folder(folder), tmp_path / "again", "compressed-tensors")
    assert np.array_equal(open_folder(tmp_path / "again").codes(UP).scale, scale)


def test_symmetric_codes_of_which_none_is_negative(make_folder, tmp_path):
    """They fit fewer bits where they are stored, but not where half of the numbers are for negative codes."""
    source = integer_folder(make_folder("llama"), tmp_path / "q", "int4_g32")
    opened = open_folder(source)
    matrix = opened.codes(UP)
    arrays = LAYOUTS["dense"].pack(type(matrix)(np.abs(matrix.codes).clip(0, 7), matrix.scale)).arrays
    assert arrays["weight_code"].tolist() == [3, 0]
    changed(source, **arrays)
    export_hf(open_folder(source), tmp_path / "ct", "compressed-tensors")
    assert np.array_equal(open_folder(tmp_path / "ct").codes(UP).codes, np.abs(matrix.codes).clip(0, 7))


def test_columns_in_another_order_are_refused(folder):
    changed(folder, weight_g_idx=np.repeat(np.array([0, 1], np.int32), 32))
    open_folder(folder)
    changed(folder, weight_g_idx=np.repeat(np.array([1, 0], np.int32), 32))
    with pytest.raises(ValueError, match=rf"{UP}: its columns are spread over the groups"):
        open_folder(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight_scale": None}, "weight_packed, but no weight_scale"),
        ({"weight_packed": None}, "weight_scale, but no weight_packed"),
        ({"weight_packed": np.zeros((160, 8), np.float32)}, "weight_packed has dtype F32, expected I32"),
        ({"weight_packed": np.zeros((160, 9), np.int32)}, "9 words a row, but 64 codes of 4 bits take 8"),
        ({"weight_shape": np.array([160, 63])}, r"weight_shape \(160, 63\), but the matrix is \(160, 64\)"),
        ({"weight_scale": np.ones((160, 3), np.float16)}, "do not share out"),
        ({"weight_scale": np.full((160, 2), np.inf, np.float16)}, "320 values that are not finite"),
    ],
)
def test_broken_folders_are_refused(folder, tensors, message):
    changed(folder, **tensors)
    with pytest.raises(ValueError, match=message):
        open_folder(folder).codes(UP)


def weights(**changes):
    return {
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | changes
    }


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"format": "float-quantized"}, "format is 'float-quantized'"),
        ({"config_groups": None}, "no config_groups"),
        ({"config_groups": {"group_0": weights(type="float")}}, "expected integers"),
        ({"config_groups": {"group_0": weights(num_bits=9)}}, "weights have 9 bits"),
        ({"config_groups": {"group_0": weights() | {"input_activations": {"num_bits": 8}}}}, "activations are rounded"),
        ({"config_groups": {"group_0": weights(num_bits=3)}}, "8 words a row, but 64 codes of 3 bits take 6"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "cached keys and values"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "weights are rotated"),
    ],
)
def test_forms_that_nobody_runs_are_refused(folder, entries, message):
    path = folder / "config.json"
    tree = json.loads(path.read_text())
    tree["quantization_config"] |= entries
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=message):
        open_folder(folder).codes(UP)


def test_words_with_empty_bits_are_refused_by_name():
    """Older releases of compressed-tensors put ten codes of three bits into a word."""
    scale, words = np.ones((4, 1), np.float32), np.zeros((4, 10), np.int32)
    with pytest.raises(ValueError, match="left bits of each word empty"):
        PackQuantized(3).unpack(Packed({"weight_packed": words, "weight_scale": scale}), (4, 96))

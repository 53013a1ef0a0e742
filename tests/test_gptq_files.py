"""GPTQ's layout and folders: bits where FACTS 8.3 says, versions 1 and 2, there and back; GPTQModel as the truth."""

import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from integer_folder import integer_folder, stored

from tritkit.checkpoint import open_folder
from tritkit.cli import main
from tritkit.engine.torch import model_of
from tritkit.formats import format_of
from tritkit.hf_export import export_hf
from tritkit.importer import import_model
from tritkit.layouts import Packed
from tritkit.layouts.gptq import Gptq
from tritkit.layouts.words import from_words, to_words
from tritkit.methods.rtn import unpacked
from tritkit.models.shapes import linear_names
from tritkit.tensorfile import TensorFile, write_tensors

UP = "model.layers.0.mlp.up_proj"


def matrix(format: str, seed: int = 0, shape=(64, 96), mean: float = 0.0):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean
    return unpacked(format_of(format).quantize(w))


def values(matrix) -> np.ndarray:
    rows, groups = len(matrix.codes), matrix.scale.shape[1]
    found = matrix.codes.reshape(rows, groups, -1) * matrix.scale[..., None]
    return (found if matrix.offset is None else found + matrix.offset[..., None]).reshape(rows, -1)


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_are_a_stream_of_bits(bits):
    """Python's own big integers as the oracle."""
    fields = np.random.default_rng(0).integers(0, 1 << bits, (5, 75), dtype=np.uint8)
    words = to_words(fields, bits)
    assert words.dtype == np.int32 and words.shape == (5, -(-75 * bits // 32))
    for row, found in zip(fields, words, strict=True):
        number = sum(int(value) << bits * i for i, value in enumerate(row))
        assert [number >> 32 * i & 0xFFFFFFFF for i in range(len(found))] == (
            found.astype(np.int64) & 0xFFFFFFFF
        ).tolist()
    assert np.array_equal(from_words(words, bits, 75), fields)


def by_the_facts(arrays: dict[str, np.ndarray], bits: int, version: int) -> np.ndarray:
    """w = scales[g] * (q - zero[g]), bit by bit as FACTS 8.3 tells it: float32 [out, in]."""

    def field(words: np.ndarray, i: int) -> np.ndarray:
        words = words.astype(np.int64) & 0xFFFFFFFF
        if bits != 3:
            per = 32 // bits
            return words[i // per] >> i % per * bits & (1 << bits) - 1
        first, j = i // 32 * 3, i % 32
        if j < 10:
            return words[first] >> 3 * j & 7
        if j == 10:
            return words[first] >> 30 & 3 | (words[first + 1] & 1) << 2
        if j < 21:
            return words[first + 1] >> 1 + 3 * (j - 11) & 7
        if j == 21:
            return words[first + 1] >> 31 & 1 | (words[first + 2] & 3) << 1
        return words[first + 2] >> 2 + 3 * (j - 22) & 7

    columns = len(arrays["g_idx"])
    rows = arrays["scales"].shape[1]
    q = np.stack([field(arrays["qweight"], i) for i in range(columns)], axis=1)
    zeros = np.stack([field(arrays["qzeros"].T, o) for o in range(rows)], axis=1) + (version == 1)
    group = arrays["g_idx"]
    return arrays["scales"].astype(np.float32)[group].T * (q - zeros[group].T)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["g32", "g48", "row", "g32_asym"])
def test_bytes_say_what_the_facts_say(bits, kind, version):
    m = matrix(f"int{bits}_{kind}")
    if version == 1 and m.offset is not None:  # which cannot hold a zero point of 0
        w = np.abs(np.random.default_rng(0).normal(size=(64, 96))).astype(np.float32)
        m = unpacked(format_of(f"int{bits}_{kind}").quantize(torch.from_numpy(-w)))
    layout = Gptq(bits, version)
    packed = layout.pack(m)
    half = m.scale.astype(np.float16).astype(np.float32)
    wanted = values(type(m)(m.codes, half, None if m.offset is None else half * np.rint(m.offset / m.scale)))
    np.testing.assert_allclose(by_the_facts(packed.arrays, bits, version), wanted, rtol=1e-6, atol=1e-7)
    back = layout.unpack(packed, m.codes.shape)
    assert np.array_equal(back.codes, m.codes) and np.array_equal(back.scale, half)
    assert (back.offset is None) == (m.offset is None)
    assert back.offset is None or np.array_equal(back.offset, half * np.rint(m.offset / m.scale))
    dtypes = {name: array.dtype.name for name, array in packed.arrays.items()}
    assert dtypes == {"qweight": "int32", "qzeros": "int32", "scales": "float16", "g_idx": "int32"}


def test_symmetric_zero_points_of_four_bits():
    for version, word in ((1, 0x77777777), (2, 0x88888888)):
        qzeros = Gptq(4, version).pack(matrix("int4_g32")).arrays["qzeros"]
        assert set((qzeros.reshape(-1).astype(np.int64) & 0xFFFFFFFF).tolist()) == {word}


def test_version_one_and_zero_points_of_zero():
    """It is not written, since one less is none; where GPTQModel wrote it by subtracting from whole words, the borrows
    are undone as its own loader does."""
    m = matrix("int4_g32_asym", mean=3.0)  # all above zero, so that zero points are 0
    assert (m.offset == 0).any()
    with pytest.raises(ValueError, match="stores zero points less one, and 188 of these are 0; gptq_v2"):
        Gptq(4, 1).pack(m)
    arrays = Gptq(4, 2).pack(matrix("int4_g32_asym", mean=1.5)).arrays
    qzeros = arrays["qzeros"].view(np.uint32)
    assert (from_words(arrays["qzeros"], 4, 64) == 0).any()
    borrowed = (qzeros - np.uint32(0x11111111)).view(np.int32)
    first = Gptq(4, 1).unpack(Packed(arrays | {"qzeros": borrowed}), (64, 96))
    second = Gptq(4, 2).unpack(Packed(arrays), (64, 96))
    assert np.array_equal(first.offset, second.offset) and np.array_equal(first.codes, second.codes)


@pytest.mark.parametrize("version", [1, 2])
def test_groups_of_zeros_alone(version):
    """Their scale may be 0, which no zero point goes into."""
    m = matrix("int4_g32_asym", mean=-2.0)
    m.scale[3, 1], m.offset[3, 1] = 0.0, 0.0
    back = Gptq(4, version).unpack(Gptq(4, version).pack(m), (64, 96))
    rounded = type(m)(m.codes, m.scale.astype(np.float16).astype(np.float32), m.offset)
    np.testing.assert_allclose(values(back), values(rounded), rtol=1e-3, atol=2e-3)
    assert not values(back)[3, 32:64].any()


def test_what_the_layout_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="2, 3, 4 or 8 bits, not 5"):
        Gptq(5, 2)
    with pytest.raises(ValueError, match="62 rows of 4 do not fill"):
        Gptq(4, 2).pack(matrix("int4_g32", shape=(62, 96)))
    with pytest.raises(ValueError, match="4 bits hold the codes -8 to 7, not"):
        Gptq(4, 2).pack(matrix("int5_g32"))
    m = matrix("int4_row")
    with pytest.raises(ValueError, match=r"float16, at most 65504, but one is"):
        Gptq(4, 2).pack(type(m)(m.codes, m.scale * 1e6))


@pytest.mark.parametrize("to", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("format", ["int4_g32", "int2_g16", "int3_g32", "int8_row", "int4_g32_asym", "int5_row_asym"])
def test_folders_there_and_back(make_folder, tmp_path, to, format):
    source = integer_folder(make_folder("llama"), tmp_path / "q", format)
    if to == "gptq" and format.endswith("_asym"):
        shift_zeros(source)
    report = export_hf(open_folder(source), tmp_path / "out", to)
    assert report["types"][to] == 14 and len(report["notes"]) == ("row" in format)
    ours, theirs = open_folder(source), open_folder(tmp_path / "out")
    assert theirs.container == "gptq" and dict(theirs.layouts) == dict.fromkeys(linear_names(ours.config), "dense")
    for name in linear_names(ours.config):
        a, b = ours.codes(name), theirs.codes(name)
        assert np.array_equal(a.codes, b.codes), name
        half = a.scale.astype(np.float16).astype(np.float32)
        assert np.array_equal(half, b.scale)
        assert (a.offset is None) == (b.offset is None)
        assert a.offset is None or np.array_equal(b.offset, -half * np.rint(-a.offset / a.scale))
    for name in set(ours.tensors) & set(theirs.tensors):
        if name.rpartition(".")[0] not in ours.layouts:
            assert np.array_equal(ours.tensors[name].array, theirs.tensors[name].array)
    q = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert q == json.loads((tmp_path / "out/quantize_config.json").read_text())
    bits = {"5": 8}.get(format[3], int(format[3]))
    group = int(format.split("_g")[1].split("_")[0]) if "_g" in format else -1
    wanted = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": not format.endswith("_asym")}
    assert wanted.items() <= q.items() and q["checkpoint_format"] == to and q["desc_act"] is False
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "llama"


def shift_zeros(folder):
    """Make every zero point of a folder at least 1."""
    path = folder / "model.safetensors"
    file = TensorFile(path)
    tensors = {key: stored(np.maximum(t.array, 1)) if key.endswith("weight_zero") else t for key, t in file.items()}
    write_tensors(path.with_suffix(".new"), tensors, {})
    path.with_suffix(".new").replace(path)


def changed(folder, **tensors):
    """Replace or (None) drop tensors of a folder, by the ends of their names."""
    path = folder / "model.safetensors"
    found = {key: stored(np.array(t.array)) for key, t in TensorFile(path).items()}
    for name, array in tensors.items():
        key = f"{UP}.{name}"
        found.pop(key, None)
        if array is not None:
            found[key] = stored(array)
    write_tensors(path.with_suffix(".new"), found, {})
    path.with_suffix(".new").replace(path)


def config(folder, **entries):
    path = folder / "config.json"
    tree = json.loads(path.read_text())
    tree["quantization_config"] |= entries
    path.write_text(json.dumps(tree))


@pytest.fixture
def gptq_folder(make_folder, tmp_path):
    source = integer_folder(make_folder("llama"), tmp_path / "q", "int4_g32")
    export_hf(open_folder(source), tmp_path / "gptq", "gptq")
    return tmp_path / "gptq"


def test_an_imported_folder_computes_the_same(gptq_folder, tmp_path):
    import_model(gptq_folder, tmp_path / "imported")
    ours, theirs = open_folder(tmp_path / "imported"), open_folder(gptq_folder)
    assert ours.container == "folder" and dict(ours.layouts) == dict(theirs.layouts)
    assert ours.bits_per_weight() == theirs.bits_per_weight() == pytest.approx(4.5, abs=0.02)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model_of(ours)(tokens), model_of(theirs)(tokens))
    parent = open_folder(tmp_path / "q")
    with torch.no_grad():
        assert torch.equal(model_of(ours)(tokens), model_of(parent)(tokens))


def test_verbs_take_such_folders(gptq_folder, tmp_path, capsys):
    for arguments in (
        ["inspect", gptq_folder],
        ["diff", gptq_folder, tmp_path / "q"],
        ["export", gptq_folder, tmp_path / "ct", "--to", "compressed-tensors"],
        ["diff", tmp_path / "ct", gptq_folder],
        ["export", gptq_folder, tmp_path / "x.gguf", "--type", "f32"],
    ):
        assert main([str(a) for a in arguments]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "model folder of gptq" in out and "14 compressed-tensors" in out and "import to a model folder" in out
    assert main(["export", str(gptq_folder), str(tmp_path / "b"), "--to", "hf-bitlinear"]) == 2


def test_biases_of_nothing_but_zeros_are_left_out(gptq_folder):
    """AutoGPTQ gave one to every linear."""
    changed(gptq_folder, bias=np.zeros(160, np.float16))
    assert f"{UP}.bias" not in open_folder(gptq_folder).tensors
    changed(gptq_folder, bias=np.ones(160, np.float16))
    with pytest.raises(ValueError, match=rf"{UP}.bias, which config.json says nothing of"):
        open_folder(gptq_folder)


def test_act_order_is_refused_and_static_groups_are_not(gptq_folder):
    changed(gptq_folder, g_idx=np.repeat(np.array([1, 0], np.int32), 32))
    with pytest.raises(ValueError, match=rf"{UP}: its columns are spread over the groups .* neither"):
        open_folder(gptq_folder)
    config(gptq_folder, desc_act=True)
    changed(gptq_folder, g_idx=np.repeat(np.array([0, 1], np.int32), 32))
    open_folder(gptq_folder)
    changed(gptq_folder, g_idx=None)
    open_folder(gptq_folder)


def test_zero_points_of_three_bits_by_older_gptqmodels(make_folder, tmp_path):
    """Symmetric weights, of whose zero points, all 4, its releases before pull request 2763 took constants of which two
    had changed places; as written in words they are 0, 0xB6DB6DB7, 0x49249249 again and again."""
    source = integer_folder(make_folder("llama"), tmp_path / "q", "int3_g32")
    export_hf(open_folder(source), tmp_path / "gptq", "gptq")
    words = np.array([0, 0xB6DB6DB7, 0x49249249], np.uint32).view(np.int32)
    kept = open_folder(tmp_path / "gptq").codes(UP)
    changed(tmp_path / "gptq", qzeros=np.tile(words, (2, 160 // 32)))
    found = open_folder(tmp_path / "gptq").codes(UP)
    assert found.offset is None and np.array_equal(found.codes, kept.codes) and np.array_equal(found.scale, kept.scale)


def test_zero_points_that_may_mean_one_thing_or_another_are_refused(make_folder, tmp_path):
    changed_zeros = np.full((2, 15), 0x12345678, np.int32)
    source = integer_folder(make_folder("llama"), tmp_path / "q", "int3_g32")
    export_hf(open_folder(source), tmp_path / "gptq", "gptq")
    changed(tmp_path / "gptq", qzeros=changed_zeros)
    with pytest.raises(ValueError, match=r"up_proj: its zero points are not in the middle, but its config says that"):
        open_folder(tmp_path / "gptq")
    config(tmp_path / "gptq", sym=False)
    assert open_folder(tmp_path / "gptq").codes(UP).offset is not None  # of our own writing: a field each
    config(tmp_path / "gptq", meta={"quantizer": ["gptqmodel:4.2.5"]})
    with pytest.raises(
        ValueError, match=r"up_proj: what its zero points of 3 bits mean depends on the release of GPTQ"
    ):
        open_folder(tmp_path / "gptq")
    config(tmp_path / "gptq", checkpoint_format="gptq_v2")
    open_folder(tmp_path / "gptq")


def test_scales_that_float16_does_not_hold(make_folder, tmp_path):
    """They are said to be off by as much as they are, and refused where nothing would be left."""
    source = integer_folder(make_folder("llama"), tmp_path / "q", "int4_row")
    changed(source, weight_scale=np.full((160, 1), 3e-6, np.float32))
    report = export_hf(open_folder(source), tmp_path / "gptq", "gptq")
    found = open_folder(tmp_path / "gptq").codes(UP).scale
    assert report["notes"] == [f"Scales were float32 and are float16 now, at most {abs(found[0, 0] / 3e-6 - 1):.2g} of "
                               "their size off."]  # fmt: skip
    changed(source, weight_scale=np.full((160, 1), 1e-9, np.float32))
    with pytest.raises(ValueError, match=r"up_proj: gptq holds scales as float16, and 1e-09 is 0 there"):
        export_hf(open_folder(source), tmp_path / "other", "gptq")


BROKEN = [
    ({"qzeros": None}, "has qweight, but no qzeros"),
    ({"scales": None}, "has qweight, but no scales"),
    ({"qweight": np.zeros((9, 160), np.int32)}, "no 160 x 64 matrix of 2, 3, 4 or 8 bits"),
    ({"qweight": np.zeros((8, 160), np.float32)}, "qweight has dtype F32, expected I32"),
    ({"qweight": None}, "no tensor model.layers.0.mlp.up_proj.weight"),
    ({"scales": np.ones((3, 160), np.float16)}, "3 groups, which do not share out 64 columns"),
    ({"scales": np.full((2, 160), np.nan, np.float16)}, "scales has 320 values that are not finite"),
    ({"qzeros": np.zeros((2, 7), np.int32)}, "gptq wants qzeros of"),
]


@pytest.mark.parametrize(("tensors", "message"), BROKEN, ids=[m for _, m in BROKEN])
def test_broken_folders_are_refused(gptq_folder, tensors, message):
    changed(gptq_folder, **tensors)
    with pytest.raises(ValueError, match=message):
        open_folder(gptq_folder)


def test_unknown_forms_are_refused(gptq_folder):
    for form in ("marlin", 3, ["gptq"]):
        config(gptq_folder, checkpoint_format=form)
        with pytest.raises(ValueError, match=r"checkpoint_format is .*; known are gptq, gptq_v2"):
            open_folder(gptq_folder)


def test_models_that_are_no_integers_are_refused(make_folder, tmp_path):
    for source, message in [
        (make_folder("llama"), "q_proj is f32"),
        (integer_folder(make_folder("llama"), tmp_path / "nf4", "nf4_g32"), "q_proj is nf4"),
        (integer_folder(make_folder("llama"), tmp_path / "mixed", "int4_g32", up_proj="int4_g16"), "one group size"),
    ]:
        with pytest.raises(ValueError, match=message):
            export_hf(open_folder(source), tmp_path / "out", "gptq")
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"o_proj|proj: gptq stores zero points less one"):
        asym = integer_folder(make_folder("llama"), tmp_path / "asym", "int2_g16_asym")
        export_hf(open_folder(asym), tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()


THEIRS = """
import json, sys
from pathlib import Path
import torch
from gptqmodel.utils.model_dequant import convert_gptq_file
from safetensors.torch import save_file
for folder in map(Path, sys.argv[1:]):
    config = json.loads((folder / "quantize_config.json").read_text())
    found = convert_gptq_file(folder / "model.safetensors", torch.float32, config, "cpu")
    save_file({k: v.float().contiguous() for k, v in found.items()}, folder / "theirs.safetensors")
"""


@pytest.mark.interop
def test_gptqmodel_reads_the_same_weights(make_folder, tmp_path):
    """Its own code for making floats of such files (pip install gptqmodel), in a process that it may do anything to."""
    if find_spec("gptqmodel") is None:
        pytest.skip("gptqmodel is not installed")
    kinds = {"int4_g32": "gptq", "int4_g32_asym": "gptq_v2", "int3_g32": "gptq", "int3_g32_asym": "gptq_v2"}
    kinds |= {"int2_g16_asym": "gptq_v2", "int8_row": "gptq"}
    for format, to in kinds.items():
        source = integer_folder(make_folder("llama"), tmp_path / "q" / format, format)
        export_hf(open_folder(source), tmp_path / format, to)
    folders = [tmp_path / format for format in kinds]
    done = subprocess.run([sys.executable, "-c", THEIRS, *map(str, folders)], capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    for folder in folders:
        theirs, ours = TensorFile(folder / "theirs.safetensors"), open_folder(folder)
        for name in linear_names(ours.config):
            assert np.array_equal(theirs[f"{name}.weight"].float32(), ours.floats(name)), (folder.name, name)

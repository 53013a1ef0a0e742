"""Importance matrices: what they count, and both of llama.cpp's files, read byte by byte and by its gguf package."""

import struct

import numpy as np
import pytest

from tritkit.methods.importance import Importance, read_importance

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
KEYS = ("blk.0.attn_q.weight", "blk.1.ffn_down.weight")


def counted(tokens: int = 600) -> tuple[Importance, dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    found, inputs = Importance(datasets=["wiki.txt"]), {}
    for name, columns in zip(NAMES, (64, 96), strict=True):
        x = random.standard_normal((tokens, columns)).astype(np.float32)
        for part in np.array_split(x, 3):
            found.update(name, part)
        inputs[name] = x
    return found, inputs


def test_importance_is_the_mean_square_of_the_inputs():
    found, inputs = counted()
    for name, x in inputs.items():
        wanted = (x.astype(np.float64) ** 2).mean(0)
        np.testing.assert_allclose(found.of(name), wanted, rtol=1e-6)
        assert name in found and found.of(name).dtype == np.float32
    assert found.of("lm_head") is None and "lm_head" not in found
    found.add(NAMES[0], inputs[NAMES[0]][:10].astype(np.float64).sum(0) ** 2, 10)
    assert found.tokens[KEYS[0]] == 610


@pytest.mark.parametrize("end", ["gguf", "dat"])
def test_a_file_comes_back(tmp_path, end):
    found, inputs = counted()
    found.save(tmp_path / f"x.{end}")
    back = read_importance(tmp_path / f"x.{end}")
    assert back.datasets == ["wiki.txt"] and back.chunks == found.chunks + (end == "dat")  # 600 tokens are two calls
    assert set(back.arrays()) == set(KEYS)
    for name in inputs:  # the older file has float32 means times calls
        np.testing.assert_allclose(back.of(name), found.of(name), rtol=0 if end == "gguf" else 2e-7)
    back.save(tmp_path / f"again.{end}")
    last = 16 if end == "dat" else 0  # the number of chunks
    again, first = (tmp_path / f"again.{end}").read_bytes(), (tmp_path / f"x.{end}").read_bytes()
    assert again[: len(again) - last] == first[: len(first) - last]


def test_gguf_files_have_what_llama_imatrix_writes(tmp_path):
    gguf = pytest.importorskip("gguf")
    found, inputs = counted()
    found.save(tmp_path / "x.gguf")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    value = {key: field.contents() for key, field in reader.fields.items()}
    assert value["general.type"] == "imatrix" and value["imatrix.datasets"] == ["wiki.txt"]
    assert value["imatrix.chunk_count"] == 1 and value["imatrix.chunk_size"] == 512
    tensors = {t.name: t for t in reader.tensors}
    assert list(tensors) == [k + end for k in KEYS for end in (".in_sum2", ".counts")]
    for key, (_, x) in zip(KEYS, inputs.items(), strict=True):
        assert list(tensors[f"{key}.in_sum2"].shape) == [x.shape[1], 1] and tensors[f"{key}.counts"].data == 600
        np.testing.assert_allclose(tensors[f"{key}.in_sum2"].data[0], (x.astype(np.float64) ** 2).sum(0), rtol=1e-6)


def test_the_older_file_is_laid_out_as_llama_cpp_reads_it(tmp_path):
    found, _ = counted()
    found.save(tmp_path / "x.dat")
    data = (tmp_path / "x.dat").read_bytes()
    (entries,), at = struct.unpack_from("<i", data), 4
    assert entries == 2
    for key, name in zip(KEYS, NAMES, strict=True):
        (length,) = struct.unpack_from("<i", data, at)
        assert data[at + 4 : at + 4 + length].decode() == key
        calls, values = struct.unpack_from("<ii", data, at + 4 + length)
        at += 12 + length
        assert calls == 2  # of 512 tokens, begun
        sums = np.frombuffer(data, "<f4", values, at)
        assert np.array_equal(sums / np.float32(calls), found.of(name))  # as llama-quantize divides
        at += 4 * values
    assert struct.unpack_from("<ii", data, at) == (1, 8) and data[at + 8 :] == b"wiki.txt"


def test_a_linear_that_saw_no_tokens_weighs_evenly(tmp_path):
    found, _ = counted()
    found.add("lm_head", np.zeros(64), 0)
    found.save(tmp_path / "x.gguf")
    assert (read_importance(tmp_path / "x.gguf").of("lm_head") == 1).all()
    found.save(tmp_path / "x.dat")
    assert read_importance(tmp_path / "x.dat").of("lm_head") is None


def refusal(call, *args) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_importance_matrix_is_refused(tmp_path):
    from tritkit.gguf_writer import NewTensor, write_gguf

    path, gguf = tmp_path / "x.dat", tmp_path / "x.gguf"
    assert "there is no file" in refusal(read_importance, path)
    assert "no inputs were counted" in refusal(Importance().save, path)
    found, _ = counted()
    found.save(path)
    data = path.read_bytes()
    for length in range(0, len(data), 7):  # a file that ends between two entries' parts is no shorter file
        path.write_bytes(data[:length])
        complete = length >= len(data) - 16
        if not complete:
            assert "x.dat is" in refusal(read_importance, path)
    path.write_bytes(struct.pack("<i", 1 << 30) + data[4:])
    assert "claims 1073741824 entries" in refusal(read_importance, path)
    path.write_bytes(data[:4] + struct.pack("<i", -5) + data[8:])
    assert "ends within entry 1 of 2" in refusal(read_importance, path)
    bad = bytearray(data)
    at = 4 + 4 + len(KEYS[0]) + 8
    bad[at : at + 4] = struct.pack("<f", float("nan"))
    path.write_bytes(bytes(bad))
    assert "the importance of 'blk.0.attn_q.weight' is not finite or below zero" in refusal(read_importance, path)

    def tensor(shape, value=1.0):
        return NewTensor("f32", shape, lambda: np.full(shape, value, np.float32))

    kind = {"general.type": "imatrix"}
    write_gguf(gguf, {"general.type": "model"}, {})
    assert "of type 'model', expected an importance matrix" in refusal(read_importance, gguf)
    write_gguf(gguf, kind, {})
    assert "an importance matrix of nothing" in refusal(read_importance, gguf)
    write_gguf(gguf, kind, {"a.in_sum2": tensor((4, 8)), "a.counts": tensor((4, 1))})
    assert "'a' belongs to a mixture of experts" in refusal(read_importance, gguf)
    write_gguf(gguf, kind, {"a.in_sum2": tensor((1, 8))})
    assert "has no tensor 'a.counts'" in refusal(read_importance, gguf)
    write_gguf(gguf, kind, {"a.in_sum2": tensor((1, 8)), "a.counts": tensor((1, 1), np.nan)})
    assert "'a' counts nan tokens" in refusal(read_importance, gguf)
    write_gguf(gguf, kind, {"a.weight": tensor((1, 8))})
    assert "'a.weight', which is no part of an importance matrix" in refusal(read_importance, gguf)


def test_inputs_that_do_not_fit_are_refused():
    found, _ = counted()
    assert "has 64 columns, but these are sums of 3" in refusal(found.add, NAMES[0], np.ones(3), 1)
    assert "are not finite" in refusal(found.update, NAMES[0], np.full((2, 64), np.inf, np.float32))


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_what_is_collected_is_what_flows_in_llama_cpp(make_model, tmp_path):
    """The inputs of every linear while llama.cpp runs the same tokens through the same weights."""
    import torch

    from tritkit.checkpoint import open_folder
    from tritkit.gguf_export import export_gguf
    from tritkit.methods.calibration import Calibration
    from tritkit.methods.collect import collect_importance
    from tritkit.models.shapes import linear_names

    peer = pytest.importorskip("ggml_peer")
    folder = open_folder(make_model("llama"))
    export_gguf(folder, tmp_path / "x.gguf", "f32")
    tokens = torch.randint(3, 300, (3, 64), generator=torch.Generator().manual_seed(0))
    found = collect_importance(folder, Calibration(tokens, tokens[:0]))
    theirs = peer.squares_of_inputs(tmp_path / "x.gguf", tokens.numpy())
    assert len(theirs) == len(linear_names(folder.config)) == len(found.sums)
    for name, sums in theirs.items():
        assert found.tokens[name] == tokens.numel()
        np.testing.assert_allclose(found.sums[name], sums, rtol=1e-3, atol=1e-6 * sums.max(), err_msg=name)

"""safetensors files: the library reads ours, we read the library's, and a hostile file is refused."""

import json
import struct

import numpy as np
import pytest

from tritkit.folderwriter import float_to_bf16
from tritkit.tensorfile import StoredTensor, TensorFile, write_tensors

ARRAYS = {
    "F64": np.array([1.5, -2.0]),
    "F32": np.arange(12, dtype=np.float32).reshape(3, 4),
    "F16": np.array([[0.5], [65504.0]], np.float16),
    "I64": np.array([2**62, -1]),
    "I32": np.array([[1, 2, 3]], np.int32),
    "I16": np.array([-5], np.int16),
    "I8": np.array([-128, 127, 1], np.int8),
    "U8": np.array([[255]], np.uint8),
    "BOOL": np.array([True, False, True]),
}


def written(path, tensors, metadata=None):
    write_tensors(path, tensors, metadata or {})
    return TensorFile(path)


def test_own_round_trip(tmp_path):
    tensors = {name: StoredTensor(name, array) for name, array in ARRAYS.items()}
    tensors["scalar"] = StoredTensor("F32", np.array(3.0, np.float32))
    tensors["empty"] = StoredTensor("F32", np.zeros((0, 3), np.float32))
    tensors["strided"] = StoredTensor("F32", np.arange(12, dtype=np.float32).reshape(3, 4).T)
    file = written(tmp_path / "a.safetensors", tensors, {"step": "3", "é": "🌙"})
    assert list(file) == list(tensors) and len(file) == len(tensors) and "F32" in file and "f32" not in file
    assert file.metadata == {"format": "pt", "step": "3", "é": "🌙"}
    for name, (dtype, array) in tensors.items():
        assert file[name].dtype == dtype and file[name].array.dtype == array.dtype
        assert np.array_equal(file[name].array, array) and file[name].array.shape == array.shape
    with pytest.raises(ValueError, match="no tensor 'other'"):
        file["other"]
    with pytest.raises(ValueError, match=r"read-only|readonly"):
        file["F32"].array[0, 0] = 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_library_reads_ours(tmp_path):
    import safetensors
    import torch

    bfloat16 = torch.randn(7, 5).bfloat16()
    raw = bfloat16.view(torch.uint16).numpy()
    tensors = {name: StoredTensor(name, array) for name, array in ARRAYS.items()} | {"B": StoredTensor("BF16", raw)}
    write_tensors(tmp_path / "a.safetensors", tensors, {"x": "y"})
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "x": "y"} and set(file.keys()) == set(tensors)
        for name, array in ARRAYS.items():
            assert np.array_equal(file.get_tensor(name).numpy(), array)
        assert file.get_tensor("B").dtype == torch.bfloat16 and torch.equal(file.get_tensor("B"), bfloat16)


def test_we_read_the_librarys(tmp_path):
    import torch
    from safetensors.torch import save_file

    tensors = {name: torch.from_numpy(array) for name, array in ARRAYS.items()}
    tensors["B"] = torch.randn(7, 5).bfloat16()
    save_file(tensors, tmp_path / "a.safetensors", {"x": "y"})
    file = TensorFile(tmp_path / "a.safetensors")
    assert set(file) == set(tensors) and file.metadata == {"x": "y"}
    for name, array in ARRAYS.items():
        assert file[name].dtype == name and np.array_equal(file[name].array, array)
    assert np.array_equal(file["B"].float32(), tensors["B"].float().numpy())
    assert np.array_equal(file["F16"].float32(), ARRAYS["F16"].astype(np.float32))
    with pytest.raises(ValueError, match="dtype I8"):
        file["I8"].float32()


def test_bfloat16_is_rounded_as_torch_does():
    import torch

    raw = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint64).astype(np.uint32)
    values = np.concatenate([raw.view(np.float32), np.array([0, -0.0, np.inf, -np.inf, np.nan], np.float32)])
    theirs = torch.from_numpy(values).bfloat16()
    ours = torch.from_numpy(float_to_bf16(values).view(np.int16)).view(torch.bfloat16)
    nan = theirs.isnan()
    assert torch.equal(ours.isnan(), nan) and torch.equal(ours[~nan].view(torch.int16), theirs[~nan].view(torch.int16))


def test_checksum_changes_with_every_byte(tmp_path):
    path = tmp_path / "a.safetensors"
    before = written(path, {"a": StoredTensor("U8", np.arange(40, dtype=np.uint8))}).checksum()
    content = bytearray(path.read_bytes())
    for place in (-1, -20, -40):
        content[place] ^= 1
        path.write_bytes(content)
        assert TensorFile(path).checksum() != before
        content[place] ^= 1


def file_of(tmp_path, header, data=b"\0" * 16, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)):
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


def test_the_hostile_files_are_close_to_a_good_one(tmp_path):
    assert TensorFile(file_of(tmp_path, entry()))["a"].array.shape == (2, 2)


HEADERS = {
    "not JSON": b"{nonsense",
    "not UTF-8": b'{"\xff": 1}',
    "a list": b"[1]",
    "a number": b"3",
    "nested beyond measure": b"[" * 100_000,
    "an entry that is a number": {"a": 3},
    "no offsets": {"a": {"dtype": "F32", "shape": [2, 2]}},
    "one offset": entry(offsets=[0]),
    "offsets out of bounds": entry(shape=(4, 4), offsets=(0, 64)),
    "offsets backwards": entry(offsets=(16, 0)),
    "a negative offset": entry(offsets=(-16, 0)),
    "an enormous offset": entry(offsets=(2**70, 2**70 + 16)),
    "offsets that are words": entry(offsets=("0", "16")),
    "offsets that are no integers": entry(offsets=(0.0, 16.0)),
    "another shape": entry(shape=(2, 3)),
    "a negative shape": entry(shape=(-2, -2)),
    "a shape with one unknown": entry(shape=(-1, -4)),
    "a shape of floats": entry(shape=(2.0, 2)),
    "a shape of words": entry(shape=("2", 2)),
    "a shape that is a table": {"a": {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]}},
    "a shape that is a number": {"a": {"dtype": "U8", "shape": 16, "data_offsets": [0, 16]}},
    "an enormous empty shape": entry(shape=(0, 2**80), offsets=(0, 0)),
    "too many dimensions": entry(shape=(1,) * 100 + (4,)),
    "an unknown dtype": entry("F7"),
    "a dtype that is a list": entry(["F32"]),
    "half a float": entry(shape=(4,), offsets=(0, 15)),
    "overlapping tensors": entry() | {"b": entry(shape=(2,), offsets=(8, 16))["a"]},
    "metadata that is no object": {"__metadata__": 3, **entry()},
    "metadata that is no text": {"__metadata__": {"x": 3}, **entry()},
}


@pytest.mark.parametrize("what", HEADERS)
def test_hostile_headers_are_refused(tmp_path, what):
    path = file_of(tmp_path, HEADERS[what])
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        TensorFile(path)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 10**8 + 1, 1000, 0])
def test_a_header_length_that_lies_is_refused(tmp_path, length):
    with pytest.raises(ValueError, match="not a safetensors file"):
        TensorFile(file_of(tmp_path, entry(), length=length))


def test_truncated_files_are_refused(tmp_path):
    path = file_of(tmp_path, entry())
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            TensorFile(path)
    with pytest.raises(ValueError, match="nowhere"):
        TensorFile(tmp_path / "nowhere")


def test_random_damage_is_never_a_crash(tmp_path):
    """Whatever becomes of a header, the file is read within its bounds or refused with ValueError."""
    random = np.random.default_rng(0)
    good = file_of(tmp_path, entry() | {"__metadata__": {"x": "y"}}).read_bytes()
    for _ in range(500):
        content = bytearray(good)
        for place in random.integers(0, len(good), random.integers(1, 4)):
            content[place] = random.integers(256)
        path = tmp_path / "b.safetensors"
        path.write_bytes(content)
        try:
            file = TensorFile(path)
            assert all(file[name].array.nbytes <= 16 for name in file)
        except ValueError:
            pass

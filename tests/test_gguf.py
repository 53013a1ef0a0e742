"""The container by itself: against the library of ggml's own project, and against files that lie."""

import struct

import gguf
import numpy as np
import pytest

from tritkit.gguf import ALIGNMENT, NUMBERS, TYPES, GGUFFile, GGUFTensor, Strings, tensor_bytes
from tritkit.gguf_writer import NewTensor, write_gguf

METADATA = {
    "general.architecture": "llama",
    "general.name": "Grüße",
    "llama.context_length": 128,
    "llama.rope.freq_base": 10000.5,
    "a.flag": True,
    "a.negative": -3,
    "a.large": 1 << 40,
    "a.strings": ["", "a", "▁é", "x" * 300],
    "a.scores": np.array([1.5, -2], np.float32),
    "a.kinds": np.array([1, 2, 3], np.int32),
}


def arrays():
    generator = np.random.default_rng(0)
    return {
        "token_embd.weight": ("f32", (5, 7), generator.normal(size=(5, 7)).astype(np.float32)),
        "blk.0.attn_q.weight": ("q8_0", (3, 64), generator.integers(0, 200, (3, 68)).astype(np.uint8)),
        "empty.weight": ("f16", (0,), np.zeros(0, np.float16)),
        "output_norm.weight": ("f16", (9,), generator.normal(size=9).astype(np.float16)),
    }


def write(path, metadata=METADATA):
    write_gguf(path, metadata, {n: NewTensor(k, s, lambda a=a: a) for n, (k, s, a) in arrays().items()})
    return path


def plain(value):
    return list(value) if isinstance(value, Strings | np.ndarray) else value


def test_a_file_reads_back(tmp_path):
    file = GGUFFile(write(tmp_path / "x.gguf"))
    assert {k: plain(v) for k, v in file.metadata.items()} == {k: plain(v) for k, v in METADATA.items()}
    assert file.metadata["a.strings"][1:3] == ["a", "▁é"]
    assert file.plain_metadata("a.strings") == {"a.strings": METADATA["a.strings"]}
    assert list(file) == list(arrays())
    for name, (kind, shape, array) in arrays().items():
        found = file[name]
        assert isinstance(found, GGUFTensor)
        assert (found.type, found.shape) == (kind, shape)
        assert found.data.tobytes() == array.tobytes()
        assert not found.data.flags.writeable


def test_ggmls_own_library_reads_what_we_write(tmp_path):
    reader = gguf.GGUFReader(write(tmp_path / "x.gguf"))
    assert reader.get_field("general.name").contents() == "Grüße"
    assert reader.get_field("a.strings").contents() == METADATA["a.strings"]
    assert reader.get_field("a.large").contents() == 1 << 40
    assert reader.get_field("llama.context_length").types == [gguf.GGUFValueType.UINT32]
    for tensor in reader.tensors:
        kind, shape, array = arrays()[tensor.name]
        assert tensor.tensor_type.name == kind.upper()
        assert tuple(tensor.shape)[::-1] == shape
        assert tensor.data.tobytes() == array.tobytes()


@pytest.mark.parametrize("alignment", [32, 64])
def test_we_read_what_ggmls_own_library_writes(tmp_path, alignment):
    writer = gguf.GGUFWriter(tmp_path / "y.gguf", "llama")
    writer.add_custom_alignment(alignment)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "▁"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_float64("double", 1e-300)
    for name, (kind, _, array) in arrays().items():
        if array.size:
            raw = gguf.GGMLQuantizationType.Q8_0 if kind == "q8_0" else None
            writer.add_tensor(name, array, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "y.gguf")
    assert list(file.metadata["tokenizer.ggml.tokens"]) == ["a", "b", "▁"]
    assert list(file.metadata["numbers"]) == [1, 2, 3]
    assert file.metadata["double"] == 1e-300
    for name in file:
        assert file[name].data.tobytes() == arrays()[name][2].tobytes()


def test_types_are_those_of_ggmls_own_library():
    theirs = {t.value: (t.name.lower(), *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    assert {n: tuple(t) for n, t in TYPES.items() if t.name != "i2_s"} == theirs
    assert NUMBERS["q4_k"] == 12
    assert tensor_bytes(TYPES[36], (4, 128)) == 128 + 32


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path):
    path = write(tmp_path / "x.gguf")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"w has 8 bytes, but f32 of \(4,\) takes 16"):
        write_gguf(path, {}, {"w": NewTensor("f32", (4,), lambda: np.zeros(2, np.float32))})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(tensors=0, keys=0, version=3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def entry(name=b"t", shape=(4,), kind=0, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HOSTILE = {
    "short": (b"GGUF", "has 4 bytes"),
    "magic": (b"GGML" + bytes(40), "begins with b'GGML'"),
    "version": (header(version=1) + bytes(32), "version 1, known are 2 and 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(32), "big-endian"),
    "tensor count": (header(1 << 60) + bytes(64), "claims 1152921504606846976 tensors"),
    "key count": (header(0, 1 << 60) + bytes(64), "1152921504606846976 keys"),
    "many keys": (header(0, 1 << 20) + bytes(12 << 20), "1048576 keys"),
    "string beyond the file": (header(0, 1) + struct.pack("<Q", 1 << 62) + bytes(16), "a string of"),
    "long name": (header(0, 1) + text(b"k" * 70000) + bytes(16), "a string of 70000 bytes"),
    "name is not UTF-8": (header(0, 1) + text(b"\xff\xfe") + bytes(16), "not UTF-8"),
    "unknown value type": (header(0, 1) + text(b"k") + struct.pack("<I", 77) + bytes(16), "unknown type 77"),
    "array of arrays": (header(0, 1) + text(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(16), "array of arrays"),
    "10 GB array": (
        header(0, 1) + text(b"k") + struct.pack("<IIQ", 9, 6, 10**10 // 4) + bytes(16),
        "claims 2500000000",
    ),
    "strings count": (header(0, 1) + text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 40) + bytes(99), "strings, but"),
    "strings cut off": (header(0, 1) + text(b"k") + struct.pack("<IIQQ", 9, 8, 2, 50) + bytes(16), "beyond the file"),
    "key twice": (header(0, 2) + 2 * (text(b"k") + struct.pack("<IB", 0, 1)) + bytes(8), "'k' occurs twice"),
    "ends within the header": (header(0, 1) + text(b"k") + struct.pack("<I", 10), "ends within its header"),
    "alignment": (
        header(0, 1) + text(b"general.alignment") + struct.pack("<II", 4, 33) + bytes(8),
        "general.alignment is 33",
    ),
    "tensor twice": (header(2) + entry() + entry(offset=32) + bytes(200), "'t' occurs twice"),
    "dimensions": (header(1) + entry(shape=(1,) * 9) + bytes(200), "has 9 dimensions"),
    "absurd shape": (header(1) + entry(shape=(1 << 40, 1 << 40)) + bytes(200), "has the shape"),
    "negative side": (header(1) + entry(shape=((1 << 64) - 1,)) + bytes(200), "has the shape"),
    "blocks": (header(1) + entry(shape=(33,), kind=8) + bytes(200), "blocks of 32 columns, but a row has 33"),
    "beyond the file": (header(1) + entry(shape=(1000,)) + bytes(200), "claims 4000 bytes"),
    "offset beyond the file": (header(1) + entry(offset=(1 << 64) - 32) + bytes(200), "claims 16 bytes"),
    "overlap": (header(2) + entry() + entry(b"u", offset=8) + bytes(200), "'t' and 'u' overlap"),
}


@pytest.mark.parametrize(("raw", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_get_one_sentence(tmp_path, raw, message):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=message) as caught:
        GGUFFile(path)
    assert "\n" not in str(caught.value)


def test_an_unknown_type_is_named_and_refused_when_it_is_asked_for(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(header(2) + entry(kind=141) + entry(b"u") + bytes(200))
    file = GGUFFile(path)
    assert file.type_of("t") == "type 141"
    assert file["u"].data.nbytes == 16
    with pytest.raises(ValueError, match="'t' has the unknown type 141"):
        file["t"]


def test_every_cut_of_a_good_file_is_refused(tmp_path):
    whole = write(tmp_path / "x.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for length in range(0, len(whole) - ALIGNMENT, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="GGUF file"):
            GGUFFile(path)

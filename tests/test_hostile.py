"""Files of strangers that want to do harm, made here: each is refused in one sentence, soon, and in little memory.

More of them: test_gguf.py (the container), test_tensorfile.py (headers), test_template.py (chat templates), and what
tools/fuzz.py makes at random (test_fuzz.py).
"""

import json
import struct
import time
import tracemalloc

import numpy as np
import pytest

from tritkit.checkpoint import open_folder
from tritkit.cli import main
from tritkit.gguf import GGUFFile, Strings
from tritkit.gguf_export import export_gguf
from tritkit.gguf_model import open_gguf
from tritkit.gguf_writer import NewTensor, write_gguf
from tritkit.importer import import_model
from tritkit.inspection import inspect
from tritkit.jsonfile import LARGEST, parse, shown
from tritkit.llama2c import open_llama2c
from tritkit.pack import pack
from tritkit.tensorfile import TensorFile
from tritkit.tokenizer import Tokenizer

SECONDS = 10.0  # on a machine that is busy; most take milliseconds
SMALL = 24 << 20  # bytes: jsonfile.ROOM and some more


def refused(act, *arguments):
    """The one sentence of a refusal."""
    tracemalloc.start()
    start = time.monotonic()
    try:
        with pytest.raises(ValueError) as caught:
            act(*arguments)
        assert time.monotonic() - start < SECONDS
        assert tracemalloc.get_traced_memory()[1] < SMALL
    finally:
        tracemalloc.stop()
    said = str(caught.value)
    assert type(caught.value) is ValueError and said and "\n" not in said and len(said) < 1500, said
    return said


def fails(capfd, *arguments):
    """The same at the command line: exit code 2, one line, nothing else."""
    assert main(list(arguments)) == 2
    error = capfd.readouterr().err
    assert error.startswith("tritkit: ") and error.count("\n") == 1 and error[:-1].isprintable(), error
    return error


def deep(depth, open_="[", close="]"):
    return open_ * depth + close * depth


CONFIGS = {
    "cut off": (lambda text: text[: len(text) // 2], "is not JSON"),
    "a key twice": (lambda text: '{"x": 7, "x": 8,' + text[1:], "the key 'x' occurs twice"),
    "a key twice, inside": (lambda text: '{"x": {"a": 1, "a": 2},' + text[1:], "the key 'a' occurs twice"),
    "lists in lists": (lambda text: '{"x":' + deep(100_000) + "," + text[1:], "nested too deeply"),
    "lists without end": (lambda text: '{"x":' + "[" * 100_000, "nested too deeply"),
    "tables in tables": (lambda text: '{"x":' + deep(50_000, '{"a":', "}")[:-50_000], "nested too deeply"),
    "a million lists": (lambda text: '{"x":[' + "[]," * 1_000_000 + "[]]}", "more than any model needs"),
    "a wide character": (lambda text: '{"x":"' + "a" * 10_000_000 + '\U0001f319"}', "more than any model needs"),
    "not UTF-8": (lambda text: text.encode("utf-16"), "is not JSON"),
    "digits": (lambda text: '{"x": ' + "9" * 100_000 + "," + text[1:], "is not JSON"),
    "a list": (lambda text: "[" + text + "]", "holds no JSON object"),
    "nothing": (lambda text: "", "is not JSON"),
}


@pytest.mark.parametrize(("change", "message"), CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_json_of_strangers(make_folder, name, change, message):
    folder = make_folder("b158")
    raw = change((folder / name).read_text())
    (folder / name).write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    said = refused(open_folder if name == "config.json" else Tokenizer.load, folder)
    assert name in said and message in said, said


def test_a_file_of_gigabytes_is_not_read(make_folder):
    folder = make_folder("b158")
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
        before = (folder / name).read_bytes() if (folder / name).is_file() else None
        with open(folder / name, "wb") as file:
            file.truncate(10 << 30)  # zeros that take no room
        said = refused(open_folder if name == "config.json" else Tokenizer.load, folder)
        assert str(10 << 30) in said or str(1 << 20) in said
        (folder / name).unlink()
        if before is not None:
            (folder / name).write_bytes(before)
    assert LARGEST < 10 << 30


LONG = "x" * 100_000
BIG = 10**400
VALUES = {
    "layers": ({"num_hidden_layers": 10**9}, "more than any model has"),
    "a vocabulary of gigabytes": ({"vocab_size": 2**31 - 1}, "has the shape"),
    "a number of 400 digits": ({"hidden_size": BIG}, "more than any model has"),
    "sizes below zero": ({"num_attention_heads": -4}, "at least 1"),
    "text": ({"hidden_size": LONG}, "which is no int"),
    "a list": ({"num_key_value_heads": [2]}, "which is no int"),
    "true": ({"intermediate_size": True}, "which is no int"),
    "a float": ({"vocab_size": 320.0}, "which is no int"),
    "NaN": ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    "infinity": ({"rope_theta": float("inf"), "rope_parameters": None}, "rope_theta"),
    "wide heads": ({"head_dim": 1 << 31}, "head_dim is 2147483648, more than any model has"),
    "a family that is a list": ({"model_type": ["llama"]}, "model_type"),
    "a long family": ({"model_type": LONG}, "model_type"),
    "architectures": ({"architectures": [[[LONG]]]}, "architectures"),
    "an activation": ({"hidden_act": {"a": LONG}}, "hidden_act"),
    "formats": ({"quantization_config": {"quant_method": "tritkit", "weights": ["ternary"]}}, "expected names"),
    "a method": ({"quantization_config": {"quant_method": LONG}}, "quant_method"),
    "a table": ({"quantization_config": [LONG]}, "expected an object"),
    "a layout": ({"quantization_config": {"quant_method": "tritkit", "layout": {"a": 1}}}, "layout"),
    "scaling": ({"rope_parameters": {"rope_type": "yarn", "factor": float("nan")}}, "factor nan"),
    "scaling by text": ({"rope_parameters": LONG}, "rope parameters"),
    "frequencies beyond float32": (
        {"rope_parameters": {"rope_type": "linear", "factor": 1e-300, "rope_theta": 1e4}},
        "no finite numbers",
    ),
    "turns beyond any number": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "beta_slow": 1e-320}},
        "no finite numbers",
    ),
    "another scaling": ({"rope_parameters": {"rope_type": [1]}}, "rope scaling"),
}
PATTERNS = {
    "one that takes forever": ["(a+)+$", "lm_head"],
    "many choices": [".?" * 40 + "x", "lm_head"],
    "alternatives": ["(.|..)" * 30, "lm_head"],
    "a count": ["a{99999999999}", "lm_head"],
    "a set within a set": ["[[a]", "lm_head"],
    "long": [LONG, "lm_head"],
    "many": ["a"] * 100_000,
    "for many layers": ["a.*b", "lm_head"] * 400,
}


@pytest.mark.parametrize(("values", "message"), VALUES.values(), ids=VALUES)
def test_values_of_a_config(make_folder, values, message):
    folder = make_folder("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    assert message in refused(lambda: open_folder(folder).config.rope_frequencies())


@pytest.mark.parametrize("what", PATTERNS)
def test_expressions_of_a_config(make_folder, what):
    folder = make_folder("llama")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitnet", "modules_to_not_convert": PATTERNS[what]}
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1000}))
    assert "modules_to_not_convert" in refused(open_folder, folder)


INDEXES = {
    "itself": ("model.safetensors.index.json", "no safetensors file beside it"),
    "outside": ("../model.safetensors", "no safetensors file beside it"),
    "an absolute path": ("/etc/passwd.safetensors", "no safetensors file beside it"),
    "a folder": ("", "no safetensors file beside it"),
    "a long name": ("x" * 5000, "no safetensors file beside it"),
    "not there": ("b.safetensors", "is not a safetensors file"),
    "a number": (3, "no weight_map"),
    "a list": (["a.safetensors"], "no weight_map"),
}


@pytest.mark.parametrize(("file", "message"), INDEXES.values(), ids=INDEXES)
def test_an_index_names_only_files_beside_it(make_folder, file, message):
    folder = make_folder("llama")
    index = folder / "model.safetensors.index.json"
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    names = list(TensorFile(folder / "a.safetensors"))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")}))
    assert set(open_folder(folder).tensors) == set(names)
    index.write_text(json.dumps({"weight_map": {**dict.fromkeys(names, "a.safetensors"), names[0]: file}}))
    assert message in refused(open_folder, folder)
    for odd in ({}, [], 3, None):
        index.write_text(json.dumps({"weight_map": odd}))
        assert "no weight_map" in refused(open_folder, folder)
    index.write_text(json.dumps({"weight_map": {**dict.fromkeys(names, "a.safetensors"), "b": "a.safetensors"}}))
    assert "no tensor 'b'" in refused(open_folder, folder)


HEADERS = {
    "a tensor twice": (b'{"a":%s,"a":%s}', "occurs twice"),
    "a field twice": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "occurs twice"),
    "a long name": (b'{"' + b"x" * 100_000 + b'":3}', "not understood"),
    "long numbers": (b'{"a":{"dtype":"U8","shape":[' + b"9," * 5000 + b'9],"data_offsets":[0,4]}}', "not understood"),
    "half a character": (b'{"\\ud800":3}', "not understood"),
    "a million tables": (b'{"a":[' + b"{}," * 1_000_000 + b"{}]}", "more than any model needs"),
}


@pytest.mark.parametrize(("header", "message"), HEADERS.values(), ids=HEADERS)
def test_headers_of_safetensors(tmp_path, header, message):
    entry = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = header % (entry, entry) if b"%s" in header else header
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert message in refused(TensorFile, tmp_path / "a.safetensors")


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
@pytest.mark.parametrize("container", ["folder", "gguf"])
def test_scales_that_are_no_numbers(make_folder, tmp_path, capfd, container, scale):
    wide = {"hidden_size": 256, "intermediate_size": 512}
    pack(make_folder("b158", **wide), tmp_path / "packed", "float32")
    model = tmp_path / "packed"
    if container == "folder":
        weights = model / "model.safetensors"
        stored = TensorFile(weights)["model.layers.0.mlp.up_proj.weight_scale"]
        before = stored.array.tobytes()
        where = weights.read_bytes().index(before)
        raw = bytearray(weights.read_bytes())
        raw[where : where + 4] = np.float32(scale).tobytes()
        weights.write_bytes(raw)
    else:
        model = tmp_path / "x.gguf"
        export_gguf(open_folder(make_folder("llama", **wide)), model, "q8_0")
        raw = bytearray(model.read_bytes())
        at = raw.index(GGUFFile(model)["blk.0.ffn_up.weight"].data.tobytes())
        raw[at : at + 2] = np.float16(scale).tobytes()
        model.write_bytes(raw)
    capfd.readouterr()
    assert "finite" in fails(capfd, "generate", str(model), "--prompt", "the", "--max-tokens", "2")


def replaced(tree, **parts):
    return json.dumps({**tree, **parts})


def replace(pattern, content, count):
    step = {"type": "Replace", "pattern": pattern, "content": content}
    return {"type": "Sequence", "normalizers": [step] * count}


def around(count, ids):
    piece = {"SpecialToken": {"id": "x", "type_id": 0}}
    table = {"x": {"id": "x", "ids": [1] * ids, "tokens": ["x"] * ids}} if ids else {}
    return {"type": "TemplateProcessing", "single": [piece] * count, "pair": [], "special_tokens": table}


TOKENIZERS = {
    "empty": lambda tree: "",
    "nested": lambda tree: replaced(tree, normalizer=0).replace(
        '"normalizer": 0', '"normalizer": ' + '{"type":"Sequence","normalizers":[' * 50_000 + "]}" * 50_000
    ),
    "a text that doubles 30 times": lambda tree: replaced(tree, normalizer=replace({"String": "a"}, "aa", 30)),
    "an expression that does": lambda tree: replaced(tree, normalizer=replace({"Regex": "."}, "aa", 30)),
    "many steps": lambda tree: replaced(tree, normalizer=replace({"String": "a"}, "b", 1000)),
    "a long beginning": lambda tree: replaced(tree, normalizer={"type": "Prepend", "prepend": "a" * 100_000}),
    "a million tokens around a text": lambda tree: replaced(tree, post_processor=around(1000, 1000)),
    "a panic: no such token": lambda tree: replaced(tree, post_processor=around(1, 0)),
    "a panic: pieces of nothing": lambda tree: replaced(tree, pre_tokenizer={"type": "FixedLength", "length": 0}),
    "a panic: an odd table": lambda tree: replaced(
        tree, normalizer={"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}
    ),
    "a table of gigabytes": lambda tree: replaced(
        tree, normalizer={"type": "Precompiled", "precompiled_charsmap": "////f0FB" * 100}
    ),
    "the same in disguise": lambda tree: replaced(
        tree, normalizer={"type": "Precompiled", "precompiled_charsmap": "////f0FB" * 100}
    ).replace("precompiled_charsmap", "pr\\u0065compiled\\u005Fcharsmap"),
    "a panic: a long prefix": lambda tree: replaced(
        tree, model={**tree["model"], "continuing_subword_prefix": "é" * 50}
    ),
    "parentheses": lambda tree: replaced(
        tree,
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": "(" * 100_000 + ")" * 100_000},
            "behavior": "Isolated",
            "invert": False,
        },
    ),
}


@pytest.mark.parametrize("what", TOKENIZERS)
def test_tokenizers(make_folder, capfd, what):
    folder = make_folder("b158")
    tree = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(TOKENIZERS[what](tree))
    assert "tokenizer.json is not a tokenizer" in refused(Tokenizer.load, folder)
    capfd.readouterr()
    assert "tokenizer.json" in fails(capfd, "generate", str(folder), "--prompt", "the")


def test_a_tokenizer_does_not_cut_or_fill_texts(make_folder):
    folder = make_folder("b158")
    wanted = Tokenizer.load(folder).encode("the cat sat on a mat")
    tree = json.loads((folder / "tokenizer.json").read_text())
    padding = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    padding |= {"pad_type_id": 0, "pad_token": "x"}
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(replaced(tree, padding=padding, truncation=truncation))
    assert Tokenizer.load(folder).encode("the cat sat on a mat") == wanted


def test_a_token_with_an_enormous_number(make_folder, tmp_path):
    folder = make_folder("b158")
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["model"]["vocab"]["Ġthe"] = 2**31
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    assert "2147483648" in refused(Tokenizer.load(folder).save, tmp_path)


@pytest.mark.parametrize("token", [3, ["a"], {"content": 3}, "\ud800", {"content": ["a"]}, True])
def test_special_tokens_are_texts(make_folder, token):
    folder = make_folder("b158")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": token}))
    assert "bos_token" in refused(Tokenizer.load, folder)


@pytest.mark.parametrize("stops", ["a", [2**40], [-1], [True], {"a": 1}, [[0]], 1.5])
def test_ends_are_numbers_of_tokens(make_folder, stops):
    folder = make_folder("b158")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    assert "eos_token_id" in refused(Tokenizer.load, folder)


LLAMA2C = {
    "nothing": (b"", "too short"),
    "zeros": (bytes(1000), "header would be"),
    "10 GB": (struct.pack("<7i", 4096, 11008, 32, 32, 32, 32000, 2048) + bytes(1000), "it would have 2"),
    "below zero": (struct.pack("<7i", -8, 8, 1, 1, 1, 9, 4) + bytes(1000), "header would be"),
    "enormous": (struct.pack("<7i", *[2**31 - 1] * 7) + bytes(1000), "header would be"),
    "the lowest number": (struct.pack("<7i", 8, 8, 1, 1, 1, -(2**31), 4) + bytes(1000), "header would be"),
}


@pytest.mark.parametrize(("raw", "message"), LLAMA2C.values(), ids=LLAMA2C)
def test_llama2c(tmp_path, raw, message):
    (tmp_path / "model.bin").write_bytes(raw)
    assert message in refused(open_llama2c, tmp_path / "model.bin")


def test_llama2c_of_many_small_layers(tmp_path):
    """Each layer would become nine tensors, which take more than its bytes."""
    layers = 5000
    floats = 4 * 2 + layers * (2 * 2 + 4 * 4 + 3 * 2) + 2 + 1 * 2
    (tmp_path / "model.bin").write_bytes(struct.pack("<7i", 2, 1, layers, 1, 1, 4, 1) + bytes(4 * floats))
    assert "num_hidden_layers is 5000" in refused(open_llama2c, tmp_path / "model.bin")


def other(path, out, metadata=None, rename=None, shape=None):
    """A GGUF file with other keys, names or shapes."""
    file = GGUFFile(path)
    keys = {k: v for k, v in {**file.metadata, **(metadata or {})}.items() if v is not None}
    tensors = {}
    for name in file:
        tensor = file[name]
        new = (rename or {}).get(name, [name])
        for each in new:
            sides = (shape or {}).get(name, tensor.shape)
            data = tensor.data if sides == tensor.shape else np.zeros(4 * int(np.prod(sides)), np.uint8)
            tensors[each] = NewTensor(tensor.type, sides, lambda data=data: data)
    write_gguf(out, keys, tensors)
    return out


SPAM = ["y" * 4 + str(i) for i in range(400_000)]
GGUFS = {
    "an architecture in lines": (dict(metadata={"general.architecture": "x\n\x1b[31m" + LONG}), "the architecture"),
    "an architecture of numbers": (dict(metadata={"general.architecture": np.zeros(3, np.int32)}), "the architecture"),
    "a text for a number": (dict(metadata={"llama.block_count": "two\n" + LONG}), "expected a number"),
    "an unknown key": (dict(metadata={"llama.nov\nelty": "a\nb"}), "which tritkit does not run"),
    "many layers": (dict(metadata={"llama.block_count": 10**9}), "more than any model has"),
    "a theta beyond float32": (dict(metadata={"llama.rope.freq_base": np.array([1e300])}), "expected a number"),
    "a theta below zero": (dict(metadata={"llama.rope.freq_base": -3.0}), "more than 1"),
    "a factor below zero": (
        dict(metadata={"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": -2.0}),
        "above 0",
    ),
    "one tensor by two names": (
        dict(rename={"blk.0.attn_q.weight": ["blk.0.attn_q.weight", "blk.00.attn_q.weight"]}),
        "'blk.00.attn_q.weight', which tritkit does not know",
    ),
    "digits that are none": (dict(rename={"blk.0.attn_q.weight": ["blk.²⁰.attn_q.weight"]}), "does not know"),
    "a number of 5000 digits": (dict(rename={"blk.0.attn_q.weight": [f"blk.{'9' * 5000}.attn_q.weight"]}), "not know"),
    "no side": (dict(shape={"blk.0.attn_q.weight": (0, 64)}), "is empty"),
    "one side": (dict(shape={"blk.0.attn_q.weight": (4096,)}), "has the shape"),
    "rows that no heads share": (dict(shape={"blk.0.attn_q.weight": (63, 64)}), "cannot share"),
    "more tokens than rows": (dict(metadata={"tokenizer.ggml.tokens": SPAM}), "has 400000 tokens, but its embedding"),
}


@pytest.fixture
def small_gguf(make_folder, tmp_path):
    export_gguf(open_folder(make_folder("llama")), tmp_path / "good.gguf")
    return tmp_path / "good.gguf"


@pytest.mark.parametrize(("changes", "message"), GGUFS.values(), ids=GGUFS)
def test_gguf_models(small_gguf, tmp_path, capfd, changes, message):
    path = other(small_gguf, tmp_path / "odd.gguf", **changes)
    assert message in refused(lambda: open_gguf(path).tokenizer())
    capfd.readouterr()
    assert fails(capfd, "generate", str(path), "--prompt", "the")


def test_factors_that_are_none(small_gguf, tmp_path):
    file = GGUFFile(small_gguf)
    tensors = {n: NewTensor(file[n].type, file[n].shape, lambda n=n: file[n].data) for n in file}
    for value in (1e-40, 1e30, float("nan"), -1.0, 0.0):
        odd = np.full(8, value, np.float32)
        write_gguf(
            tmp_path / "x.gguf",
            file.metadata,
            {**tensors, "rope_freqs.weight": NewTensor("f32", (8,), lambda o=odd: o)},
        )
        assert "rope_freqs.weight" in refused(open_gguf, tmp_path / "x.gguf")


def test_strings_stay_in_the_file(small_gguf, tmp_path):
    path = other(small_gguf, tmp_path / "many.gguf", {"spam": SPAM})
    tracemalloc.start()
    file = GGUFFile(path)
    assert tracemalloc.get_traced_memory()[1] < path.stat().st_size
    tracemalloc.stop()
    assert isinstance(file.metadata["spam"], Strings) and len(file.metadata["spam"]) == len(SPAM)


def test_values_are_shown_in_one_short_line():
    for value in ("a\nb", "x" * 10**6, [[["\x1b"]]] * 1000, 10**5000, np.zeros(3000), "\ud800", {"a": 10**5000}):
        assert len(shown(value)) < 300 and shown(value).isprintable(), value
    nest: list = []
    for _ in range(100_000):
        nest = [nest]
    assert "too large" in shown(nest)
    while nest:
        nest = nest[0]  # Python would free it by recursion


@pytest.mark.parametrize("layout", ["tq2_0", "q4_1"])
def test_blocks_are_as_many_as_the_config_says(make_folder, tmp_path, layout):
    folder = make_folder("llama", hidden_size=256, intermediate_size=512)
    export_gguf(open_folder(folder), tmp_path / "x.gguf", "q8_0")
    import_model(tmp_path / "x.gguf", tmp_path / "blocks")
    config = json.loads((tmp_path / "blocks" / "config.json").read_text())
    layouts = config["quantization_config"]["layouts"] or {}
    config["quantization_config"] |= {"layout": None, "layouts": {**layouts, "model.layers.0.mlp.up_proj": layout}}
    (tmp_path / "blocks" / "config.json").write_text(json.dumps(config))
    assert f"weights in {layout} are bytes" in refused(inspect, tmp_path / "blocks")


def test_good_json_is_read():
    assert parse(b'{"a": [1, {"b": null}], "\\u00e9": 1e5}', "x") == {"a": [1, {"b": None}], "é": 1e5}
    entry = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}
    large = {f"model.layers.{i}.mlp.experts.weight": entry for i in range(30_000)}
    assert len(parse(json.dumps(large, separators=(",", ":")).encode(), "x", 1 << 30)) == 30_000

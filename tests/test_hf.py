"""Our folders in transformers, each in a fresh process: with ``import tritkit`` the logits of our torch engine, without
it an error."""

import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from mixed import mixed
from test_hf_export import assert_same, logits_of, ours, relaid

from tritkit.checkpoint import open_folder
from tritkit.folderwriter import write_folder
from tritkit.hf_hook import add_to
from tritkit.layouts import GGML
from tritkit.models.shapes import matrix_names
from tritkit.pack import pack
from tritkit.tensorfile import StoredTensor

interop = pytest.mark.interop
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4}


@pytest.fixture
def tokens():
    return torch.randint(0, 320, (60, 3), generator=torch.Generator().manual_seed(0))


def in_blocks(folder, out, types: list[str]):
    """The matrices of a full-precision folder in these types in turn, as an imported GGUF file may be; None: floats."""
    source = open_folder(folder)
    tensors, layouts = dict(source.tensors), {}
    for i, name in enumerate(matrix_names(source.config)):
        kind = types[i % len(types)]
        if kind is not None:
            tensors[f"{name}.weight"] = StoredTensor("U8", GGML[kind].quantize(source.floats(name)).arrays["weight"])
            layouts[name] = kind
    write_folder(out, source.config, tensors, source.tokenizer(), layouts)
    return out


@pytest.fixture
def folders(make_folder, tmp_path):
    """Everything that transformers has no form for."""
    found = {"b1 latent": make_folder("b1")}
    pack(found["b1 latent"], tmp_path / "b1-packed", dtype="float32")
    found["b1 packed"] = tmp_path / "b1-packed"
    llama = make_folder("llama", seed=1, **WIDE)
    found["mixed, tied"] = in_blocks(llama, tmp_path / "mixed", ["q8_0", "q4_1", None, "q5_0"])
    untied = make_folder("llama", seed=2, tie_word_embeddings=False, family="qwen2")
    found["mixed, own head, biases"] = in_blocks(untied, tmp_path / "untied", ["q8_0", None, "q4_0"])
    pack(make_folder("b158", seed=3, **WIDE), tmp_path / "packed", dtype="float32")
    found["ternary blocks"] = relaid(tmp_path / "packed", tmp_path / "ternary-tq2_0", "tq2_0", "q8_0")
    found["int4_g32 and a4"] = make_folder("b158", seed=4, weights="int4_g32", activations="a4")
    wide = make_folder("llama", seed=6, tie_word_embeddings=False, **WIDE)
    found["rounded inputs"] = mixed(
        wide, tmp_path / "inputs", ["int8_row", "int4_g32_asym", "q4_k"],
        ["int8_row", "int8_tensor_asym", "int8_g32", None], embedding="int8_row", head="int6_g64",
    )  # fmt: skip
    found["outliers"] = mixed(wide, tmp_path / "outliers", ["int8_row"], ["int8_row+outliers"], threshold=1.5)
    found["adapters"] = mixed(llama, tmp_path / "adapters", ["int4_g32"], adapters=(0, 1))
    found["norms in linears"] = make_folder("b1", seed=5, linear_norm_eps=1e-6)
    return found


@interop
@pytest.mark.parametrize("mode", ["tritkit", "late"])
def test_import_tritkit_makes_transformers_run_our_folders(folders, tokens, tmp_path, mode):
    found = logits_of(mode, list(folders.values()), tokens, tmp_path)
    for (what, folder), theirs in zip(folders.items(), found, strict=True):
        assert not isinstance(theirs, str), f"{what}: {theirs}"
        opened = open_folder(folder)
        rounded = opened.config.activations is not None or opened.inputs
        assert_same(ours(folder, tokens), theirs, "hf-bitlinear" if rounded else what)


@interop
@pytest.mark.parametrize(("mode", "word"), [("plain", "tritkit_"), ("by-name", "import-tritkit")])
def test_without_it_they_are_refused(folders, tokens, tmp_path, mode, word):
    for what, error in zip(folders, logits_of(mode, list(folders.values()), tokens, tmp_path), strict=True):
        assert isinstance(error, str) and word in error, what


SAVED = """
import sys, tritkit, torch
from transformers import AutoModelForCausalLM
for folder, out in zip(sys.argv[1::2], sys.argv[2::2]):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokens = torch.tensor([[1, 2, 3]])
    assert model(tokens).logits.isfinite().all()
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape[1] <= 6
    model = AutoModelForCausalLM.from_pretrained(folder)
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    model.save_pretrained(out)
    print(held)
"""


@interop
def test_bits_are_kept_and_saved(folders, tmp_path):
    """Own bits in memory; save_pretrained writes a folder of ours with the same tensors; bfloat16 and generate run."""
    outs = {what: tmp_path / f"saved-{i}" for i, what in enumerate(folders)}
    pairs = [str(x) for what in folders for x in (folders[what], outs[what])]
    done = subprocess.run([sys.executable, "-c", SAVED, *pairs], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for what, held in zip(folders, done.stdout.split(), strict=True):
        a, b = open_folder(folders[what]), open_folder(outs[what])
        assert a.config == b.config and dict(a.layouts) == dict(b.layouts)
        assert set(a.tensors) == set(b.tensors)
        for name in a.tensors:
            assert np.array_equal(a.tensors[name].array, b.tensors[name].array), name
        assert int(held) < 1.1 * sum(t.array.nbytes for t in a.tensors.values()) + 10_000, what


TRAINED = """
import sys, tritkit, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model(torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
assert model.hf_quantizer.is_trainable
print(float(model.model.layers[0].mlp.up_proj.weight.grad.abs().sum()) > 0)
"""


@interop
def test_latent_folders_train(make_folder):
    done = subprocess.run([sys.executable, "-c", TRAINED, make_folder("b1")], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr[-3000:]


def test_the_hook_costs_nothing():
    code = "import sys, tritkit; assert not {'numpy', 'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_table_that_is_another_is_a_warning():
    with pytest.warns(UserWarning, match="could not make its folders known"):
        add_to(ModuleType("transformers.models.auto.configuration_auto"))

"""Our models against transformers' own: same logits in the same mode, and refusal where it cannot run a folder."""

import os
import subprocess
import sys

import pytest
import torch

from tritkit.checkpoint import open_folder
from tritkit.engine.torch import model_of
from tritkit.pack import pack

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

SAME_MODE = 1e-4  # float32, same operations: only the order of sums differs


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # transformers compiles its BitNet functions, which takes a minute


def theirs(folder, **arguments):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **arguments).eval()


def largest_difference(folder, tokens) -> float:
    with torch.no_grad():
        a, b = model_of(open_folder(folder)).eval()(tokens), theirs(folder)(tokens).logits
    return float((a - b).abs().max())


@pytest.fixture
def tokens():
    return torch.randint(0, 320, (2, 60), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_llama(make_folder, tokens, tied, seed):
    folder = make_folder("llama", seed, tie_word_embeddings=tied)
    assert type(theirs(folder)).__name__ == "LlamaForCausalLM"
    assert largest_difference(folder, tokens) < SAME_MODE


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bitnet_latent_is_their_online_mode(make_folder, tokens, seed):
    folder = make_folder("b158", seed)
    model = theirs(folder)
    assert type(model).__name__ == "BitNetForCausalLM"
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "AutoBitLinear"
    assert largest_difference(folder, tokens) < SAME_MODE


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bitnet_packed_is_their_offline_mode(make_folder, tokens, seed, tmp_path):
    pack(make_folder("b158", seed), tmp_path / "packed", dtype="float32")
    assert largest_difference(tmp_path / "packed", tokens) < SAME_MODE


def test_bitnet_packed_in_bfloat16_is_the_same_model(make_folder, tokens, tmp_path):
    """transformers leaves what is not quantised in the file's bfloat16, whatever dtype it is asked for; made float32
    by torch's own means it is exactly our model."""
    folder = tmp_path / "packed"
    pack(make_folder("b158"), folder)
    assert transformers.AutoModelForCausalLM.from_pretrained(folder)(tokens).logits.dtype == torch.bfloat16
    with torch.no_grad():
        ours = model_of(open_folder(folder)).eval()(tokens)
        difference = ours - torch.nn.Module.float(theirs(folder))(tokens).logits
    assert difference.abs().max() < SAME_MODE


def test_bitnet_architecture_in_full_precision(make_folder, tokens):
    """The architecture alone: no rounding that could flip, so any difference is a difference of the model."""
    folder = make_folder("b158")
    import json

    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert largest_difference(folder, tokens) < SAME_MODE


def test_gradients_equal_their_online_mode(make_folder, tokens):
    """The straight-through gradient of every latent weight, against AutoBitLinear's."""
    folder = make_folder("b158")
    a, b = model_of(open_folder(folder)), theirs(folder)
    targets = tokens.roll(-1, 1)
    a.loss(tokens, targets).backward()
    torch.nn.functional.cross_entropy(b(tokens).logits.flatten(0, 1), targets.flatten()).backward()
    their_gradients = {n: p.grad for n, p in b.named_parameters()}
    for name, p in a.named_parameters():
        torch.testing.assert_close(p.grad, their_gradients[name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("packed", [False, True])
def test_plain_transformers_refuses_b1(make_folder, tmp_path, packed):
    """In a fresh process without tritkit: an error, not a warning and random weights."""
    folder = make_folder("b1")
    if packed:
        pack(folder, tmp_path / "packed")
        folder = tmp_path / "packed"
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(folder)!r}); print('loaded')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    )
    assert done.returncode != 0 and "loaded" not in done.stdout
    assert "tritkit_bitnet" in done.stderr


def test_tokenizer_loads_and_agrees(make_folder, text_file, tokenizer):
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(make_folder("b158"))
    text = text_file.read_text(encoding="utf-8")[:3000]
    assert their_tokenizer(text)["input_ids"] == tokenizer.encode(text)
    assert their_tokenizer.bos_token_id == tokenizer.bos_id
    assert their_tokenizer.eos_token_id == tokenizer.eos_id

"""Every family and what it may have, as transformers itself writes it: the same logits, in both engines.

The folders come from transformers' classes with random weights; norms and biases are random too, so that they matter.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_engines import FULL_PRECISION, check_close, teacher_forced

from tritkit.checkpoint import open_folder
from tritkit.engine.load import decoder_weights
from tritkit.engine.native import NativeEngine
from tritkit.engine.torch import TorchEngine, model_of
from tritkit.gguf_export import export_gguf
from tritkit.models.shapes import linear_names
from tritkit.pack import pack

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

SAME_MODE = 1e-4  # float32, same operations: only the order of sums differs
CONTEXT, TRAINED = 256, 64
SHORT = 32  # of ternary models: one flipped rounding of an activation spreads over the rest of its context
NO_FLIP = 1e-5  # where none is, which is nearly everywhere
SIZES = dict(vocab_size=320, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.1)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=TRAINED)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=5e4, factor=4.0, original_max_position_embeddings=TRAINED)

FAMILIES = {
    "llama": ("llama", {}),
    "llama tied": ("llama", dict(tie_word_embeddings=True)),
    "llama with biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama with wide heads": ("llama", dict(head_dim=24)),
    "llama with narrow heads": ("llama", dict(head_dim=6, attention_bias=True)),
    "llama, linear": ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=3e4, factor=2.5))),
    "llama, llama3": ("llama", dict(rope_parameters=LLAMA3)),
    "llama, yarn": ("llama", dict(rope_parameters=YARN)),
    "llama, yarn to the fraction": ("llama", dict(rope_parameters=dict(
        **YARN, truncate=False, beta_fast=20.0, beta_slow=2.0, mscale=0.9, mscale_all_dim=0.6))),
    "llama, yarn with a factor": ("llama", dict(rope_parameters=dict(**YARN, attention_factor=0.8))),
    "llama, yarn without one": ("llama", dict(rope_parameters=dict(**{**YARN, "factor": None}))),
    "mistral": ("mistral", dict(sliding_window=None, head_dim=24)),
    "mistral with a window": ("mistral", dict(sliding_window=CONTEXT)),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", dict(tie_word_embeddings=True, rope_parameters=YARN)),
    "qwen2 with windows elsewhere": ("qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=2)),
    "qwen3": ("qwen3", dict(head_dim=24)),
    "qwen3 with biases": ("qwen3", dict(head_dim=16, attention_bias=True, tie_word_embeddings=True)),
    "qwen3, yarn": ("qwen3", dict(head_dim=32, rope_parameters=YARN)),
    "bitnet": ("bitnet", {}),
    "bitnet with biases": ("bitnet", dict(attention_bias=True, tie_word_embeddings=True)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One thread, which is the fastest for models as small as these, and no compiler: transformers compiles its BitNet
    functions, which takes a minute."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, 320, 2048).astype(np.int32)


def write(folder, family, seed=0, **changes):
    """A folder that transformers wrote, with random weights."""
    save = {k: changes.pop(k) for k in ("max_shard_size",) if k in changes}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **{**SIZES, **changes}), dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(
                model.config.initializer_range * noise if p.dim() == 2 else (0 if "bias" in name else 1) + noise / 3
            )
    model.save_pretrained(folder, **save)
    return folder


def their_logits(folder, tokens, context=CONTEXT):
    # Model.float() because what is not quantised stays in the file's dtype, whatever is asked for
    model = torch.nn.Module.float(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens.reshape(-1, context)).long()).logits.flatten(0, 1).numpy()


def logits_of_both(folder, tokens, context=CONTEXT):
    opened = open_folder(folder)
    native = NativeEngine(decoder_weights(opened), threads=1, kv_bits=32, head="float")
    return [teacher_forced(engine, tokens, context) for engine in (native, TorchEngine(model_of(opened)))]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(tmp_path, tokens, name):
    family, changes = FAMILIES[name]
    native, ours = logits_of_both(write(tmp_path, family, **changes), tokens)
    theirs = their_logits(tmp_path, tokens)
    assert theirs.std() > 0.5
    assert np.abs(ours - theirs).max() < SAME_MODE
    assert np.abs(native - ours).max() < FULL_PRECISION


def test_every_entry_matters(tmp_path, tokens):
    """With another entry the same weights give other logits, so the comparisons above could fail."""
    names = [n for n, (family, _) in FAMILIES.items() if family in ("llama", "qwen2")] + ["mistral with a window"]
    names = [n for n in names if "tied" not in n and "heads" not in n]
    folders = {n: write(tmp_path / n, FAMILIES[n][0], **FAMILIES[n][1]) for n in names}
    logits = {n: logits_of_both(folder, tokens[:CONTEXT])[1] for n, folder in folders.items()}
    same = {(a, b) for a in names for b in names if a < b and np.abs(logits[a] - logits[b]).max() < 1e-2}
    assert same == {
        ("llama", "mistral with a window"),  # as wide as the context
        ("llama, yarn", "llama, yarn without one"),  # the factor is that of the contexts
        ("qwen2", "qwen2 with windows elsewhere"),  # in layers that it does not have
    }


@pytest.mark.parametrize("parameters", [
    dict(type="linear", factor=2.5),
    {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
    dict(type="yarn", factor=4.0, original_max_position_embeddings=TRAINED),
], ids=lambda p: p.get("type", "llama3"))  # fmt: skip
def test_the_spelling_before_version_5(tmp_path, tokens, parameters):
    write(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_scaling": parameters, "rope_theta": 2e4}))
    native, ours = logits_of_both(tmp_path, tokens)
    assert np.abs(ours - their_logits(tmp_path, tokens)).max() < SAME_MODE
    assert np.abs(native - ours).max() < FULL_PRECISION


def test_sharded_safetensors(tmp_path, tokens):
    write(tmp_path, "qwen2", max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    native, ours = logits_of_both(tmp_path, tokens)
    assert np.abs(ours - their_logits(tmp_path, tokens)).max() < SAME_MODE
    assert np.abs(native - ours).max() < FULL_PRECISION


# --- Ternary checkpoints, in every convention that there is.

BITLINEAR = dict(quant_method="bitnet", modules_to_not_convert=None)  # HF1BitLLM/Llama3-8B-1.58, Falcon3-1.58
OFFLINE = dict(quant_method="bitnet", linear_class="autobitlinear", quantization_mode="offline")  # BitNet-b1.58-2B-4T
ONLINE = dict(quant_method="bitnet", linear_class="autobitlinear", quantization_mode="online")  # its bf16 masters
PARTS = ["lm_head", "model.layers.0.self_attn", "model.layers.1.mlp.gate_proj", r"model\.layers\..*\.v_proj"]
NORMS = dict(use_rms_norm=True, rms_norm_eps=1e-4)

TERNARY = {
    "llama, bitlinear": ("llama", {}, BITLINEAR),
    "llama tied, bitlinear": ("llama", dict(tie_word_embeddings=True), BITLINEAR),
    "llama with biases, bitlinear": ("llama", dict(attention_bias=True, mlp_bias=True), BITLINEAR),
    "falcon-e": ("llama", dict(head_dim=24), {**BITLINEAR, "modules_to_not_convert": ["lm_head"]}),
    "parts in full precision": ("llama", dict(attention_bias=True), {**BITLINEAR, "modules_to_not_convert": PARTS}),
    "llama with norms inside": ("llama", {}, {**BITLINEAR, **NORMS}),
    "norms inside, parts": ("llama", {}, {**BITLINEAR, **NORMS, "modules_to_not_convert": PARTS}),
    "bitnet, bitlinear": ("bitnet", {}, BITLINEAR),
    "bitnet, offline": ("bitnet", dict(tie_word_embeddings=True), OFFLINE),
    "bitnet, offline, norms inside": ("bitnet", {}, {**OFFLINE, **NORMS}),
    "bitnet, offline, parts": ("bitnet", {}, {**OFFLINE, "modules_to_not_convert": PARTS}),
    "bitnet, online": ("bitnet", {}, ONLINE),
    "bitnet, online, norms and parts": ("bitnet", {}, {**ONLINE, **NORMS, "modules_to_not_convert": PARTS}),
    "qwen3, online": ("qwen3", dict(head_dim=24), ONLINE),
    "qwen2, bitlinear": ("qwen2", {}, BITLINEAR),
}


def quantize(folder, table, seed=0):
    """What transformers' conversion scripts write: codes packed by its own function, the scale in its convention."""
    from transformers.integrations.bitnet import pack_weights
    from transformers.quantizers.quantizers_utils import should_convert_module

    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(seed)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        module = name.removesuffix(".weight")
        if not should_convert_module(module, table.get("modules_to_not_convert") or ["lm_head"]):
            continue
        if table.get("use_rms_norm"):
            noise = torch.randn(tensors[name].shape[1], generator=generator)
            tensors[f"{module}.rms_norm.weight"] = 1 + 0.3 * noise
        if table.get("quantization_mode") != "online":
            scale = 1 / tensors[name].abs().mean()
            tensors[name] = pack_weights((tensors[name] * scale).round().clamp(-1, 1))
            stored = 1 / scale if table.get("linear_class") == "autobitlinear" else scale
            tensors[f"{module}.weight_scale"] = stored.reshape(1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": table}))
    return folder


@pytest.mark.parametrize("name", TERNARY)
def test_ternary_logits_are_those_of_transformers(tmp_path, tokens, name):
    family, changes, table = TERNARY[name]
    write(tmp_path, family, **{"initializer_range": 0.02, **changes})
    native, ours = logits_of_both(quantize(tmp_path, table), tokens, SHORT)
    theirs = their_logits(tmp_path, tokens, SHORT)
    assert np.quantile(np.abs(ours - theirs), 0.9) < NO_FLIP
    assert np.quantile(np.abs(native - ours), 0.9) < NO_FLIP
    check_close(ours, theirs)
    check_close(native, ours)


def test_the_masters_in_bfloat16(tmp_path, tokens):
    """Latent weights as microsoft/bitnet-b1.58-2B-4T-bf16 stores them."""
    quantize(write(tmp_path, "bitnet", initializer_range=0.02), ONLINE)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    native, ours = logits_of_both(tmp_path, tokens, SHORT)
    check_close(ours, their_logits(tmp_path, tokens, SHORT))
    check_close(native, ours)


@pytest.mark.parametrize("name", ["bitnet, online, norms and parts", "qwen3, online"])
def test_packing_them_changes_nothing(tmp_path, tokens, tokenizer, name):
    """Latent to packed by tritkit, and read again by transformers: the norms inside and what stays float go along."""
    family, changes, table = TERNARY[name]
    folder, packed = tmp_path / "latent", tmp_path / "packed"
    quantize(write(folder, family, **{"initializer_range": 0.02, **changes}), table)
    tokenizer.save(folder)
    pack(folder, packed, dtype="float32")
    native, ours = logits_of_both(packed, tokens, SHORT)
    assert np.array_equal(native, logits_of_both(folder, tokens, SHORT)[0])
    check_close(ours, their_logits(packed, tokens, SHORT))
    config = open_folder(folder).config
    assert open_folder(packed).config == config
    floats = [n for n in linear_names(config) if n not in open_folder(packed).layouts]
    assert len(floats) == (0 if family == "qwen3" else 4 + 1 + 1)
    if table.get("use_rms_norm"):
        with pytest.raises(ValueError, match="has a norm in front of each low-bit linear, for which GGUF has no place"):
            export_gguf(open_folder(packed), tmp_path / "x.gguf")


def test_gradients_of_norms_inside_and_biases(tmp_path, tokens):
    """Of every parameter, against AutoBitLinear's: straight through the roundings, into the norms and biases too."""
    table = TERNARY["bitnet, online, norms and parts"][2]
    quantize(write(tmp_path, "bitnet", seed=1, initializer_range=0.02, attention_bias=True), table)
    ours = model_of(open_folder(tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.from_numpy(tokens[:64]).long().reshape(2, 32)
    ours.loss(ids, ids.roll(-1, 1)).backward()
    torch.nn.functional.cross_entropy(theirs(ids).logits.flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    names = dict(ours.named_parameters())
    assert set(names) == set(expected) and any("rms_norm" in n for n in names) and any("bias" in n for n in names)
    for name, p in names.items():
        off = torch.linalg.norm(p.grad - expected[name]) / torch.linalg.norm(expected[name])
        assert off < 0.01, name  # one flipped rounding may be in it


# --- Models of the families that tritkit makes itself.


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "bitnet"])
@pytest.mark.parametrize("weights", [None, "ternary"])
def test_what_is_trained_here_is_loaded_there(tmp_path, text_file, tokens, family, weights):
    from tritkit.cli import main

    settings = dict(family=family, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=CONTEXT, vocab_size=320)  # fmt: skip
    settings |= {"head_dim": 24, "rope.type": "yarn", "rope.factor": 4.0} if family == "qwen3" else {}
    settings |= dict(attention_bias="true", mlp_bias="true") if family == "llama" else {}
    settings |= {} if weights is None else dict(weights=weights, activations="a8")
    train = ["--train.steps=3", "--train.batch_size=2", "--train.sequence_length=32", "--train.eval_tokens=64"]
    train += ["--optim.warmup_steps=1", "--train.dtype=float32"]
    options = [f"--model.{name}={value}" for name, value in settings.items()]
    assert main(["train", str(tmp_path / "m"), "--data", str(text_file), *train, *options]) == 0
    native, ours = logits_of_both(tmp_path / "m", tokens, SHORT)
    theirs = their_logits(tmp_path / "m", tokens, SHORT)
    check_close(ours, theirs)
    check_close(native, ours)
    assert type(transformers.AutoConfig.from_pretrained(tmp_path / "m")).model_type == family


def test_patterns_match_as_in_transformers():
    from transformers.quantizers.quantizers_utils import should_convert_module

    from tritkit.models.config import is_excluded

    names = ["lm_head", *(f"model.layers.{i}.{n}" for i in (1, 11) for n in ("self_attn.q_proj", "mlp.gate_proj"))]
    patterns = ["model.layers.1", "layers.1", "q_proj", "model.layers.*.gate", "mlp.gate", "gate_proj", "lm_head$"]
    patterns += ["1.mlp", "model", "model.layers.1.self_attn|lm_head", "proj", r"model\.layers\.[0-9]\.mlp", "layer."]
    for pattern in patterns:
        for name in names:
            assert is_excluded(name, (pattern,)) != should_convert_module(name, [pattern]), (pattern, name)

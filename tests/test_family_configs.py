"""What of a config.json is refused, each by its name; and in both engines the families as tritkit writes them."""

import json

import numpy as np
import pytest
from test_engines import FULL_PRECISION, both, check_close

from tritkit.checkpoint import open_folder
from tritkit.models import FAMILIES
from tritkit.models.config import ModelConfig
from tritkit.models.rope import SCALINGS, Rope
from tritkit.models.shapes import linear_names
from tritkit.models.transformer import build
from tritkit.pack import pack
from tritkit.trainstate import save_model

SIZES = dict(vocab_size=320, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1)  # fmt: skip
BITLINEAR = dict(quant_method="bitnet", modules_to_not_convert=None)
ONLINE = dict(quant_method="bitnet", linear_class="autobitlinear", quantization_mode="online")
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)  # fmt: skip


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, 320, 1024).astype(np.int32)


@pytest.mark.parametrize("family", FAMILIES)
def test_native_equals_torch_in_every_family(tmp_path, tokenizer, tokens, family):
    """With what the family may have, and positions beyond those that it was trained on."""
    changes = dict.fromkeys(FAMILIES[family].biases, True)
    changes |= {"head_dim": 24} if family not in ("bitnet", "llama") else {}
    scaling = (
        Rope("yarn", factor=4.0, original_max_position_embeddings=64)
        if family == "qwen3"
        else Rope("linear", factor=2.0)
    )
    config = ModelConfig(family=family, rope=scaling, **SIZES, **changes)
    model = build(config, seed=0)
    vary(model)
    save_model(tmp_path, model, config, tokenizer)
    assert open_folder(tmp_path).config == config
    native, torch_ = both(tmp_path, tokens, 256)
    assert np.abs(native - torch_).max() < FULL_PRECISION


def test_parts_in_full_precision_and_norms_inside_in_our_own_formats(tmp_path, tokenizer, tokens):
    """Binary weights, which transformers has no form for: what stays float and the norms are in the folder."""
    parts = ("lm_head", "model.layers.0.mlp", "model.layers.*.q_proj")
    config = ModelConfig(
        weights="binary", activations="a8_q128", full_precision=parts, linear_norm_eps=1e-4,
        **{**SIZES, "initializer_range": 0.02},
    )  # fmt: skip
    model = build(config, seed=0)
    vary(model)
    save_model(tmp_path / "latent", model, config, tokenizer)
    pack(tmp_path / "latent", tmp_path / "packed", dtype="float32")
    packed = open_folder(tmp_path / "packed")
    assert packed.config == open_folder(tmp_path / "latent").config == config
    floats = [name.removeprefix("model.layers.") for name in linear_names(config) if name not in packed.layouts]
    mlp = [f"0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert floats == ["0.self_attn.q_proj", *mlp, "1.self_attn.q_proj"]
    native, torch_ = both(tmp_path / "packed", tokens, 32)
    check_close(native, torch_)
    assert np.array_equal(native, both(tmp_path / "latent", tokens, 32)[0])


def vary(model) -> None:
    """Norms and biases that matter."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))


def test_every_field_of_a_scaling_is_one_of_some_type():
    used = {name for scaling in SCALINGS.values() for name in (*scaling.needs, *scaling.takes)}
    assert used | {"type"} == set(Rope.__dataclass_fields__)


@pytest.fixture(scope="module")
def written(tmp_path_factory, tokenizer):
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        config = ModelConfig(family=family, **SIZES)
        save_model(folder, build(config, seed=0), config, tokenizer)
    return folders


REFUSED = [
    ("llama", dict(model_type="gemma2"), "model_type 'gemma2'; tritkit runs llama, mistral, qwen2, qwen3, bitnet"),
    ("llama", dict(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
    ("llama", dict(architectures=["BitnetForCausalLM"]), "BitnetForCausalLM"),
    ("llama", dict(hidden_act="gelu"), "hidden_act 'gelu'; the llama family has 'silu'"),
    ("qwen3", dict(hidden_act="relu2"), "hidden_act 'relu2'"),
    ("mistral", dict(sliding_window=64), "sliding_window 64, shorter than the context of 256.*max_position_embeddings"),
    ("qwen2", dict(use_sliding_window=True, sliding_window=64, max_window_layers=1, layer_types=None), "window 64"),
    ("qwen3", dict(layer_types=["full_attention", "sliding_attention"]), "'sliding_attention'"),
    ("llama", dict(layer_types=["full_attention"]), None),  # transformers' llama does not look at it
    ("mistral", dict(attention_bias=True), "attention_bias = true, but the mistral family"),
    ("qwen2", dict(mlp_bias=True), "mlp_bias = true, but the qwen2 family"),
    ("llama", dict(attention_bias=True), r"no tensor model.layers.0.self_attn.k_proj.bias"),
    ("qwen2", dict(model_type="llama", architectures=None), "a tensor model.layers.0.self_attn.._proj.bias"),
    ("qwen3", dict(model_type="llama", architectures=None), "it is another model"),
    ("llama", dict(rope_parameters=dict(rope_type="dynamic", factor=2.0)), "rope scaling 'dynamic'"),
    ("llama", dict(rope_parameters=dict(rope_type="longrope", long_factor=[1.0])), "rope scaling 'longrope'"),
    ("llama", dict(rope_parameters=dict(rope_type="yarn", factor=-1.0)), "factor -1.0"),
    ("llama", dict(rope_parameters=dict(rope_type="linear", factor="two")), "factor 'two'"),
    ("llama", dict(rope_parameters=dict(rope_type="linear", factor=float("nan"))), "factor nan"),
    ("llama", dict(rope_parameters=dict(LLAMA3, high_freq_factor=1.0)), "high_freq_factor"),
    ("llama", dict(rope_theta=0.5, rope_parameters=None), "rope_theta"),
    ("llama", dict(rope_parameters=["linear"]), "no table"),
    ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    ("qwen3", dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.25)), "partial_rotary_factor"),
    ("llama", dict(logit_scale=0.0625), "logit_scale 0.0625"),
    ("llama", dict(residual_multiplier=0.2), "residual_multiplier"),
    ("llama", dict(final_logit_softcapping=30.0), "final_logit_softcapping"),
    ("llama", dict(attention_dropout=0.1, pretraining_tp=2, use_cache=False, logit_scale=1.0), None),
    ("llama", dict(head_dim=17), "head_dim 17"),
    ("bitnet", dict(head_dim=8), "the bitnet family has a norm as wide as the hidden"),
    ("llama", dict(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    ("llama", dict(rms_norm_eps=10**400), "rms_norm_eps"),
    ("llama", dict(hidden_size=2**40), "hidden_size"),
    ("llama", dict(quantization_config=dict(BITLINEAR, modules_to_not_convert=["gate_proj"])), "without lm_head"),
    ("llama", dict(quantization_config=dict(BITLINEAR, modules_to_not_convert="lm_head")), "a list of names"),
    ("llama", dict(quantization_config=dict(BITLINEAR, modules_to_not_convert=["lm_head", "(a"])), "'\\(a'"),
    ("llama", dict(quantization_config=dict(BITLINEAR, modules_to_not_convert=["(a*)*", "lm_head"])), "too intricate"),
    ("llama", dict(quantization_config=dict(BITLINEAR, use_rms_norm=True, rms_norm_eps="x")), "rms_norm_eps 'x'"),
    ("llama", dict(quantization_config=dict(ONLINE, use_rms_norm=True)), "no tensor .*rms_norm.weight"),
    ("llama", dict(quantization_config=dict(BITLINEAR)), "no tensor .*weight_scale"),
    ("llama", dict(quantization_config=dict(ONLINE, quantization_mode="sometimes")), "'sometimes'"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_refused_by_name(tmp_path, written, family, changes, message):
    config = json.loads((written[family] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    (tmp_path / "model.safetensors").symlink_to(written[family] / "model.safetensors")
    if message is None:
        open_folder(tmp_path)
        return
    with pytest.raises(ValueError, match=message) as error:
        open_folder(tmp_path)
    assert "\n" not in str(error.value)

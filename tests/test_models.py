"""The decoder: decoding with a cache is one pass; grouped-query attention; reading and writing config.json."""

import dataclasses

import pytest
import torch

from tritkit.models import FAMILIES
from tritkit.models.config import ModelConfig, config_from_hf
from tritkit.models.shapes import linear_names, linear_shape
from tritkit.models.transformer import build

FORMATS_OF = {"llama": (None, None), "b158": ("ternary", "a8"), "b1": ("binary", "a8_q128")}
ONE_PASS = 1e-5  # float32, sums in another order


def config(kind="llama", **changes):
    weights, activations = FORMATS_OF[kind]
    changes = {"family": "llama" if kind == "llama" else "bitnet", **changes}
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=48, initializer_range=0.2)
    return ModelConfig(weights=weights, activations=activations, **(sizes | changes))


def ids(length=40, batch=2):
    return torch.randint(0, 96, (batch, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def in_pieces(model, tokens, pieces):
    cache, parts, start = model.new_cache(), [], 0
    for size in pieces:
        parts.append(model(tokens[:, start : start + size], cache))
        start += size
    return torch.cat(parts, 1)


@pytest.mark.parametrize("family", ["llama", "bitnet"])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_cached_decoding_is_one_pass(family, heads):
    model = build(config(family=family, num_key_value_heads=heads), seed=1)
    tokens = ids()
    with torch.no_grad():
        whole = model(tokens)
    for pieces in ([1] * 40, [40], [7, 1, 1, 20, 11], [1, 39]):
        torch.testing.assert_close(in_pieces(model, tokens, pieces), whole, rtol=ONE_PASS, atol=ONE_PASS)


@pytest.mark.parametrize("kind", ["b158", "b1"])
def test_cached_decoding_of_low_bit_models(kind):
    """A last bit can flip the rounding of an activation, so this holds at the median."""
    model = build(config(kind), seed=1)
    with torch.no_grad():
        difference = (in_pieces(model, ids(), [13] + [1] * 27) - model(ids())).abs()
    assert difference.median() < ONE_PASS


def test_the_future_changes_nothing():
    model = build(config(), seed=2)
    a, b = ids(), ids()
    b[:, 25:] = 3
    with torch.no_grad():
        assert torch.equal(model(a)[:, :25], model(b)[:, :25])
        assert not torch.equal(model(a)[:, 25:], model(b)[:, 25:])


def test_grouped_queries_share_keys_and_values():
    """A model of 2 key-value heads is the model of 4 whose heads 0, 1 and 2, 3 are the same."""
    small, large = build(config(), seed=3), build(config(num_key_value_heads=4), seed=4)
    state = small.state_dict()
    for name in state:
        if "k_proj" in name or "v_proj" in name:
            state[name] = state[name].view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32)
    large.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(large(ids()), small(ids()), rtol=ONE_PASS, atol=ONE_PASS)


def test_bfloat16_attention_equals_torchs():
    """The plain products that run in bfloat16 on a CPU, against torch's fused attention in float32."""
    from tritkit.models.transformer import attend

    q, k, v = (torch.randn((2, 3, n, 16), generator=torch.Generator().manual_seed(n)) for n in (9, 21, 21))
    for past in (0, 12):
        s = past + 9
        mask = torch.ones(9, s, dtype=torch.bool).tril(past)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k[:, :, :s], v[:, :, :s], attn_mask=mask)
        found = attend(q.bfloat16(), k[:, :, :s].bfloat16(), v[:, :, :s].bfloat16(), past)
        assert (found.float() - expected).abs().max() < 0.03
        exact = attend(q, k[:, :, :s], v[:, :, :s], past)
        torch.testing.assert_close(exact, expected, rtol=1e-5, atol=1e-6)


def test_context_overflow_is_refused():
    model = build(config(), seed=0)
    with pytest.raises(ValueError, match="49 tokens, but the model's context is 48"):
        model(ids(49))
    cache = model.new_cache()
    model(ids(48), cache)
    with pytest.raises(ValueError, match="49 tokens"):
        model(ids(1), cache)


def test_loss_is_the_mean_over_counted_targets():
    model, tokens, targets = build(config(), seed=0), ids(), ids().roll(-1, 1)
    targets[:, -3:] = -1
    with torch.no_grad():
        p = model(tokens).double().log_softmax(-1)[:, :-3].gather(-1, targets[:, :-3, None])
        assert model.loss(tokens, targets).item() == pytest.approx(-p.mean().item(), rel=1e-5)


@pytest.mark.parametrize("kind", FORMATS_OF)
@pytest.mark.parametrize("tied", [True, False])
def test_build_is_deterministic(kind, tied):
    a, b, other = (build(config(kind, tie_word_embeddings=tied), seed=s) for s in (5, 5, 6))
    torch.manual_seed(99)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.model.embed_tokens.weight, other.model.embed_tokens.weight)
    spread = torch.cat([p.flatten() for p in a.parameters() if p.dim() == 2]).std()
    assert spread.item() == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("kind", FORMATS_OF)
def test_linears_are_those_of_the_checkpoint(kind):
    model = build(config(kind), seed=0)
    assert list(model.linears()) == linear_names(model.config)
    for name, module in model.linears().items():
        assert tuple(module.weight.shape) == linear_shape(model.config, name)


@pytest.mark.parametrize("kind", FORMATS_OF)
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "rope_theta": 12345.0, "rms_norm_eps": 1e-6}])
def test_config_round_trip(kind, changes):
    c = config(kind, **changes)
    assert config_from_hf(c.to_hf(), c.weights, c.activations) == c


REFUSED = [
    ({"model_type": "mamba"}, "model_type 'mamba'"),
    ({"model_type": None}, "model_type None"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope scaling 'llama3' needs low_freq_factor"),
    ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope scaling 'linear' needs factor"),
    ({"head_dim": 5}, "head_dim 5"),
    ({"hidden_size": 30}, r"hidden_size 30 .*num_attention_heads 4"),
    ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ({"num_key_value_heads": 0}, "num_key_value_heads"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"num_hidden_layers": -1}, "num_hidden_layers"),
    ({"hidden_size": "32"}, "hidden_size"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ({"rope_parameters": [1]}, "rope"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_run_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**config().to_hf(), **changes}, None, None)


@pytest.mark.parametrize(
    "name", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
def test_a_size_that_is_missing_is_named(name):
    hf = config().to_hf()
    del hf[name]
    with pytest.raises(ValueError, match=name):
        config_from_hf(hf, None, None)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_what_config_json_leaves_out_is_as_in_transformers(family):
    transformers = pytest.importorskip("transformers")
    hf = dict(vocab_size=96, hidden_size=320, intermediate_size=80, num_hidden_layers=2, num_attention_heads=160)
    hf |= {"sliding_window": None} if family == "mistral" else {}
    theirs = transformers.AutoConfig.for_model(family, **hf)
    ours = config_from_hf({"model_type": family, **hf}, None, None)
    for field in ("tie_word_embeddings", "rms_norm_eps", "max_position_embeddings", "num_key_value_heads"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 2)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    if family == "mistral":
        del hf["sliding_window"]
        with pytest.raises(ValueError, match=f"sliding_window {type(theirs)().sliding_window}, shorter"):
            config_from_hf({"model_type": family, **hf}, None, None)


def test_settings_of_a_model_are_checked():
    for name in [f.name for f in dataclasses.fields(ModelConfig) if f.type == "int" and f.name != "head_dim"]:
        with pytest.raises(ValueError, match=name):
            config(**{name: 0})
    with pytest.raises(ValueError, match="even head size"):
        config(hidden_size=36)
    with pytest.raises(ValueError, match="unknown model family 'gpt'"):
        config(family="gpt")

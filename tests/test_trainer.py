"""Training: killed anywhere it goes on to the same bytes; each way to stop leaves a good checkpoint and says so."""

import dataclasses
import errno
import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from tritkit import config, results
from tritkit.checkpoint import open_folder
from tritkit.models.config import ModelConfig
from tritkit.models.transformer import Transformer
from tritkit.optim import OptimConfig
from tritkit.tensorfile import TensorFile
from tritkit.tokenizer import Tokenizer
from tritkit.trainer import DataConfig, Settings, TrainConfig, TrainingStopped, _Run, load_settings, train

SUM_ORDER = 1e-5  # relative: float32 sums over the same sequences in another order
KINDS = {"llama": ("llama", None, None), "b158": ("bitnet", "ternary", "a8"), "b1": ("bitnet", "binary", "a8_q128")}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make(text_file, vocabulary):
    """make("b158", steps=20, lr=...): settings of a tiny run on the nonsense text."""

    def settings(kind="b158", lr=4e-3, warmup=3, clip=1.0, **changes):
        family, weights, activations = KINDS[kind]
        sizes = dict(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        model = ModelConfig(
            family, **sizes, num_key_value_heads=1, max_position_embeddings=32, weights=weights, activations=activations
        )
        defaults = dict(steps=20, batch_size=4, sequence_length=16, dtype="float32", eval_every=10, eval_tokens=128)
        return Settings(
            model,
            DataConfig(sources=(str(text_file),), tokenizer=vocabulary),
            OptimConfig(lr=lr, warmup_steps=warmup, clip=clip),
            TrainConfig(**(defaults | {"save_every": 5, "threads": 1} | changes)),
        )

    return settings


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [(entry["step"], entry["loss"], entry.get("val_loss")) for entry in log(folder)]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def leftovers(folder):
    return [p.name for p in folder.rglob("*.tmp")]


def at_step(number, act):
    """A loss function that calls ``act`` in the forward pass of step ``number`` (one pass a step)."""
    calls = 0

    def loss(model, x, y):
        nonlocal calls
        calls += 1
        value = Transformer.loss(model, x, y)
        return act(value) if calls == number else value

    return loss


def interrupt(value):
    raise KeyboardInterrupt


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from tritkit.trainer import load_settings, train
import torch, torch._dynamo  # here once: the optimiser would import it in every child
torch.set_num_threads(1)
settings, out = load_settings(sys.argv[1]), Path(sys.argv[2])
chance = random.Random(int(sys.argv[3]))

def start(folder):
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        train(settings, folder)
        os._exit(0)
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(1)

def until(child, condition):
    while not condition():
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    return True

def steps():
    path = out / "log.jsonl"
    return path.read_bytes().count(b"\\n") if path.is_file() else 0

def saving():
    return any((out / "training").glob(".step-*.tmp")) or any(out.glob(".model.*.tmp"))

assert os.waitpid(start(Path(sys.argv[2] + "-whole")), 0)[1] == 0
kills = 0
for aim in ["begin", "step", "save", "save", "step", "end", "rename"]:
    child = start(out)
    goal = min(steps() + chance.randint(2, 8), 28)
    since = time.time()
    if aim == "begin":
        alive = until(child, lambda: time.time() - since > chance.random() * 0.3)
    elif aim == "end":
        alive = until(child, lambda: any(out.glob(".*.tmp")) or (out / "model.safetensors").is_file())
    elif aim == "rename":
        alive = until(child, lambda: (out / "config.json").is_file())
    else:
        alive = until(child, lambda: steps() >= goal and (aim == "step" or saving()))
    if not alive:
        break
    time.sleep(chance.random() * 0.004)
    os.kill(child, signal.SIGKILL)
    kills += os.waitpid(child, 0)[1] == signal.SIGKILL
if not (out / "config.json").is_file() or (out / "training").is_dir():
    child = start(out)
    assert os.waitpid(child, 0)[1] == 0
print("kills", kills)
"""


def test_killed_anywhere_it_ends_in_the_same_bytes(make, tmp_path):
    """The resume law: SIGKILL while it reads, steps, saves and ends; every step is in the log once."""
    settings = make(steps=30, save_every=1)
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, tokenizer=None))
    (tmp_path / "run.toml").write_text(config.dump(settings))
    command = [sys.executable, "-c", textwrap.dedent(KILLER), str(tmp_path / "run.toml"), str(tmp_path / "out"), "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) >= 5, done.stdout
    whole, out = tmp_path / "out-whole", tmp_path / "out"
    assert weights(out) == weights(whole)
    assert losses(out) == losses(whole) and [e["step"] for e in log(out)] == list(range(1, 31))
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.iterdir())
    assert (out / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulation_changes_nothing(make, tmp_path, micro):
    train(make("llama", steps=6), tmp_path / "whole")
    train(make("llama", steps=6, micro_batch=micro), tmp_path / "parts")
    for a, b in zip(log(tmp_path / "whole"), log(tmp_path / "parts"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=SUM_ORDER)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * SUM_ORDER)
    with pytest.raises(ValueError, match=r"micro_batch 3 does not divide .*batch_size 4"):
        make(micro_batch=3)


def test_the_same_settings_give_the_same_bytes(make, tmp_path):
    for name in "ab":
        train(make(), tmp_path / name)
    train(make(seed=1), tmp_path / "c")
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def stopped(settings, out, loss, **arguments):
    with pytest.raises(TrainingStopped) as error:
        train(settings, out, loss=loss, **arguments)
    assert "\n" not in str(error.value)
    return error.value


def test_ctrl_c_keeps_every_step(make, tmp_path):
    train(make(), tmp_path / "whole")
    for step in (1, 8, 20):
        error = stopped(make(), tmp_path / "out", at_step(step, interrupt))
        assert error.code == 130 and f"after step {step - 1} of 20" in str(error)
        train(make(), tmp_path / "out")
        assert weights(tmp_path / "out") == weights(tmp_path / "whole")
        assert losses(tmp_path / "out") == losses(tmp_path / "whole")
        for file in (tmp_path / "out").iterdir():
            file.unlink()


def pressing(act):
    """``act`` with Ctrl-C pressed before it, the first time that it is called."""
    calls = []

    def both(self):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return act(self)

    return both


def test_ctrl_c_between_the_parts_of_a_step(make, tmp_path, monkeypatch):
    """A real signal while the optimiser steps or while it validates: the step is finished first."""
    train(make(), tmp_path / "whole")
    for what in ("step", "validate"):
        with monkeypatch.context() as patch:
            if what == "step":
                patch.setattr(torch.optim.AdamW, "step", pressing(torch.optim.AdamW.step))
            else:
                patch.setattr(_Run, "validate", pressing(_Run.validate))
            error = stopped(make(), tmp_path / what, Transformer.loss)
        assert error.code == 130 and f"after step {1 if what == 'step' else 10} of 20" in str(error)
        train(make(), tmp_path / what)
        assert weights(tmp_path / what) == weights(tmp_path / "whole")
        assert losses(tmp_path / what) == losses(tmp_path / "whole")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_impatient_ctrl_c_goes_back_to_the_last_checkpoint(make, tmp_path, monkeypatch):
    train(make(), tmp_path / "whole")

    def torn(optimizer):
        if optimizer.state and next(iter(optimizer.state.values()))["step"] >= 7:
            raise KeyboardInterrupt
        return step(optimizer)

    step = torch.optim.AdamW.step
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", torn)
        assert "after step 5 of 20" in str(stopped(make(), tmp_path / "out", Transformer.loss))
    train(make(), tmp_path / "out")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["a bit", "cut", "empty", "step", "name"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(make, tmp_path, damage, capsys):
    train(make(), tmp_path / "whole")
    out = tmp_path / "out"
    stopped(make(), out, at_step(13, interrupt))  # checkpoints of steps 10 and 12
    files = sorted((out / "training").glob("step-*.safetensors"))
    assert [f.stem for f in files] == ["step-00000010", "step-00000012"]
    content = bytearray(files[-1].read_bytes())
    places = {"step": content.index(b'"step":"12"') + 8, "name": content.index(b"exp_avg_sq.")}
    content[places.get(damage, -1000)] ^= 1
    files[-1].write_bytes({"cut": content[:-100], "empty": b""}.get(damage, content))
    train(make(), out)
    assert "warning" in capsys.readouterr().err
    assert weights(out) == weights(tmp_path / "whole") and losses(out) == losses(tmp_path / "whole")


def test_all_checkpoints_damaged_begins_anew(make, tmp_path):
    train(make(), tmp_path / "whole")
    stopped(make(), tmp_path / "out", at_step(13, interrupt))
    for file in (tmp_path / "out" / "training").glob("step-*.safetensors"):
        file.write_bytes(b"nothing")
    train(make(), tmp_path / "out")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops(make, tmp_path, factor):
    out = tmp_path / "out"
    error = stopped(make(), out, at_step(13, lambda value: value * factor))
    assert error.code == 2
    assert "step 13" in str(error) and "learning rate (--optim.lr=0.002)" in str(error) and "step 10" in str(error)
    assert sorted(p.name for p in (out / "training").glob("step*")) == [
        "step-00000005.safetensors",
        "step-00000010.safetensors",
    ]
    assert not (out / "config.json").exists() and len(log(out)) == 12
    train(make(), out)  # as nothing is wrong with the numbers themselves
    train(make(), tmp_path / "whole")
    assert weights(out) == weights(tmp_path / "whole") and losses(out) == losses(tmp_path / "whole")


@pytest.mark.parametrize("step", [13, 20])
def test_a_full_disk_leaves_the_last_good_checkpoint(make, tmp_path, monkeypatch, step):
    """At the save of step 15, and at the last one."""
    out, full = tmp_path / "out", []
    sync = os.fsync

    def fsync(handle):
        if full and ".tmp" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    error = stopped(make(), out, at_step(step, lambda value: full.append(1) or value))
    last = 10 if step == 13 else 15
    assert error.code == 2 and "No space left" in str(error) and f"step {last}" in str(error)
    assert leftovers(out) == []
    full.clear()
    train(make(), out)
    train(make(), tmp_path / "whole")
    assert weights(out) == weights(tmp_path / "whole") and losses(out) == losses(tmp_path / "whole")


def test_other_settings_are_refused_by_name(make, tmp_path):
    out = tmp_path / "out"
    stopped(make(), out, at_step(7, interrupt))
    with pytest.raises(ValueError, match=r"other settings \(lr = 0\.005\)"):
        train(make(lr=5e-3), out)
    with pytest.raises(ValueError, match=r"other settings \(.*steps = 21"):
        train(make(steps=21), out)
    train(make(lr=5e-3), out, overwrite=True)
    train(make(lr=5e-3), tmp_path / "fresh")
    assert weights(out) == weights(tmp_path / "fresh") and losses(out) == losses(tmp_path / "fresh")


def test_a_mistake_may_be_mended_with_the_same_folder(make, tmp_path):
    """Before the first checkpoint nothing is lost, so other settings are no conflict."""
    good = make(steps=2)
    wrong = [
        dataclasses.replace(good, data=dataclasses.replace(good.data, sources=("nowhere.txt",))),
        dataclasses.replace(good, data=dataclasses.replace(good.data, sources=())),
        dataclasses.replace(good, data=dataclasses.replace(good.data, val=good.data.sources)),
        dataclasses.replace(good, data=dataclasses.replace(good.data, tokenizer="nowhere")),
        make(sequence_length=64),
        make(init="nowhere"),
    ]
    messages = ["no file nowhere", "no text to train on", "both training and held-out", "no tokenizer", "32", "nowhere"]
    for settings, message in zip(wrong, messages, strict=True):
        with pytest.raises(ValueError, match=message):
            train(settings, tmp_path / "out")
    train(good, tmp_path / "out")


def test_a_finished_folder_is_left_alone(make, tmp_path):
    out = tmp_path / "out"
    train(make(steps=3), out, keep_optimizer=True)
    before = weights(out)
    with pytest.raises(ValueError, match="already holds a trained model"):
        train(make(steps=3), out)
    broken = dataclasses.replace(make(steps=3), data=DataConfig(sources=("nowhere.txt",)))
    for settings in (broken, make(sequence_length=64)):
        with pytest.raises(ValueError):
            train(settings, out, overwrite=True)  # a mistake costs nothing
        assert weights(out) == before
    train(make(steps=3, seed=1), out, overwrite=True)
    assert weights(out) != before
    assert not (out / "optimizer.safetensors").exists()  # of the model that is gone


def test_what_a_finished_folder_holds(make, tmp_path, tokenizer):
    out = tmp_path / "out"
    metrics = train(make(), out)
    names = ["config.json", "generation_config.json", "log.jsonl", "model.safetensors", "results.json"]
    assert sorted(p.name for p in out.iterdir()) == [*names, "tokenizer.json", "tokenizer_config.json", "tritkit.toml"]
    assert [e["step"] for e in log(out)] == list(range(1, 21))
    assert [e["step"] for e in log(out) if "val_loss" in e] == [10, 20]
    assert [e["lr"] for e in log(out)] == [OptimConfig(lr=4e-3, warmup_steps=3).lr_at(s, 20) for s in range(20)]
    assert metrics["val_loss"] == log(out)[-1]["val_loss"] and metrics["tokens"] == 20 * 4 * 16
    assert metrics["train_loss"] == pytest.approx(np.mean([e["loss"] for e in log(out)]))
    assert results.latest(out)["val_perplexity"] == pytest.approx(math.exp(metrics["val_loss"]))
    assert load_settings(out / "tritkit.toml") == make()
    folder = open_folder(out)
    assert (folder.config.weights, folder.config.activations, folder.is_packed) == ("ternary", "a8", False)
    assert len(folder.tokenizer()) == len(tokenizer) == folder.config.vocab_size


def test_training_goes_on_with_the_moments_that_were_kept(make, tmp_path):
    """The first step of a second run from a folder with optimizer.safetensors is Adam's with those moments."""
    for name, keep in (("kept", True), ("dropped", False)):
        train(make("llama"), tmp_path / name, keep_optimizer=keep)
    assert weights(tmp_path / "kept") == weights(tmp_path / "dropped")
    moments = TensorFile(tmp_path / "kept" / "optimizer.safetensors")
    second = make("llama", steps=1, warmup=0, clip=0.0, seed=5)
    gradient = {}

    def loss(model, x, y):
        value = Transformer.loss(model, x, y)
        names = [n for n, _ in model.named_parameters()]
        found = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        gradient.update({n: g.clone() for n, g in zip(names, found, strict=True)})
        return value

    for name in ("kept", "dropped"):
        settings = dataclasses.replace(second, train=dataclasses.replace(second.train, init=str(tmp_path / name)))
        train(settings, tmp_path / f"{name}-2", loss=loss)
        before, after = (TensorFile(tmp_path / n / "model.safetensors") for n in (name, f"{name}-2"))
        for key in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
            g = gradient[key].double().numpy()
            m = v = t = 0
            if name == "kept":
                m, v = (moments[f"{k}.{key}"].float32().astype(float) for k in ("exp_avg", "exp_avg_sq"))
                t = float(moments[f"step.{key}"].float32())
                assert t == 20
            m, v, t = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g, t + 1
            step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
            decay = 0.0 if "norm" in key else 0.1
            w = before[key].float32().astype(float)
            np.testing.assert_allclose(after[key].float32(), w * (1 - 4e-3 * decay) - 4e-3 * step, rtol=0, atol=2e-6)
    assert weights(tmp_path / "kept-2") != weights(tmp_path / "dropped-2")


def test_training_on_keeps_the_vocabulary(make, tmp_path, tmp_path_factory):
    """Other text, no tokenizer named: the ids must still mean what the embedding has learnt."""
    train(make(steps=2), tmp_path / "first")
    other = tmp_path / "other.txt"
    other.write_text("quite different words about ships, engines and numbers\n" * 200)
    settings = make(steps=2, init=str(tmp_path / "first"))
    settings = dataclasses.replace(settings, data=DataConfig(sources=(str(other),)))
    train(settings, tmp_path / "second")
    first, second = (Tokenizer.load(tmp_path / n) for n in ("first", "second"))
    assert first.inner.to_str() == second.inner.to_str()


def test_a_full_precision_model_becomes_the_start_of_a_low_bit_one(make, tmp_path):
    train(make("b1", steps=2), tmp_path / "b1")
    train(make("b158", steps=2, init=str(tmp_path / "b1")), tmp_path / "b158")
    with pytest.raises(ValueError, match=r"has no tensor .*sub_norm"):
        train(make("llama", steps=2), tmp_path / "llama")
        train(make("b158", steps=2, init=str(tmp_path / "llama")), tmp_path / "no")


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_goes_down(make, tmp_path, kind):
    train(make(kind, steps=60, lr=1e-2, batch_size=8), tmp_path / "out")
    found = [e["loss"] for e in log(tmp_path / "out")]
    assert found[0] == pytest.approx(math.log(320), abs=0.2)  # knows nothing
    assert np.mean(found[-5:]) < found[0] - 1
    assert log(tmp_path / "out")[-1]["val_loss"] < found[0] - 1


def test_held_out_text_of_its_own(make, tmp_path, text_file):
    held = tmp_path / "held.txt"
    held.write_text("the cat sang of rain\n" * 50)
    settings = make(steps=2)
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, val=(str(held),)))
    train(settings, tmp_path / "a")
    train(make(steps=2), tmp_path / "b")
    assert log(tmp_path / "a")[-1]["val_loss"] != log(tmp_path / "b")[-1]["val_loss"]


def test_little_text_trains_or_is_refused(make, tmp_path):
    for text, good in (("the cat sat on the mat.\n" * 60, True), ("too short", False), ("x", False)):
        path = tmp_path / "little.txt"
        path.write_text(text)
        settings = dataclasses.replace(make(steps=2), data=dataclasses.replace(make().data, sources=(str(path),)))
        if good:
            assert math.isfinite(train(settings, tmp_path / "out", overwrite=True)["val_loss"])
        else:
            with pytest.raises(ValueError, match=r"too few|empty"):
                train(settings, tmp_path / "out", overwrite=True)


WRONG = [
    ({"train.stepz": "3"}, "no setting 'train.stepz'; did you mean 'train.steps'"),
    ({"train.steps": "many"}, "'train.steps' wants int, not 'many'"),
    ({"train.steps": "0"}, "train.steps must be at least 1, not 0"),
    ({"train.dtype": "float16"}, "train.dtype is 'float16'"),
    ({"optim.schedule": "cosine"}, "optim.schedule is 'cosine'"),
    ({"model.family": "gpt"}, "unknown model family 'gpt'"),
    ({"model.hidden_size": "30"}, "model.hidden_size 30"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG)
def test_wrong_settings_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_settings(None, overrides)

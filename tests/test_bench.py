"""The bench: what it makes, what it counts and what it refuses. No test looks at how fast anything is."""

import importlib.util
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tritkit import _native, results
from tritkit.checkpoint import open_folder
from tritkit.cli import main
from tritkit.engine import Job
from tritkit.engine.load import decoder_weights
from tritkit.engine.native import NativeEngine
from tritkit.models.shapes import linear_names
from tritkit.speed.bench import KEYS, ratios
from tritkit.speed.child import Child
from tritkit.speed.machine import Look, Machine, Sample, Stopwatch, energy_counters, machine_of
from tritkit.speed.measure import Samples, Work, linear_weights, report
from tritkit.speed.shapes import LOGIT_SPREAD, SHAPES, random_folder, shape_named, temporary_folder

MACHINE = Machine(stream_gb_s=50.0, stream_best=53.0, streams=4, ahead=2048, int8_gops=2000.0, threads=2)
PEAK = MACHINE.int8_gops / MACHINE.threads


def bench(capsys, *arguments: str) -> dict:
    """The JSON of a run, which is the last line of standard output."""
    assert main(["bench", *arguments]) == 0
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1])


def refused(capsys, *arguments: str) -> str:
    assert main(["bench", *arguments]) == 2
    return capsys.readouterr().err


def test_the_2b4t_shape_has_its_weights():
    config = SHAPES["bitnet-2b4t"]
    assert linear_weights(config) == 2_084_044_800
    assert config.vocab_size * config.hidden_size == 328_335_360


@pytest.mark.parametrize("name", ["bitnet-tiny", "llama-tiny"])
def test_random_folders_are_model_folders(name):
    with random_folder(name, SHAPES[name]) as path:
        folder = open_folder(path)
        for linear in linear_names(folder.config):
            if folder.is_packed:
                codes = folder.codes(linear).codes
                shares = [(codes == code).mean() for code in (-1, 0, 1)]
                assert max(abs(share - 1 / 3) for share in shares) < 0.02
        native = NativeEngine(decoder_weights(folder), threads=1)
        logits = native.step([Job(native.new(), np.arange(100, dtype=np.int32), "all")])[0]
        assert np.isfinite(logits).all() and 0.5 < logits.std() / LOGIT_SPREAD < 2  # nothing explodes, nothing dies
    assert not path.exists()


def test_a_shape_has_room_for_any_context():
    assert shape_named("bitnet-2b4t").max_position_embeddings == 4096
    assert shape_named("bitnet-2b4t", 4224).max_position_embeddings == 4224
    with pytest.raises(ValueError, match="no shape 'bitnet-9t'; known are bitnet-2b4t"):
        shape_named("bitnet-9t")


def test_a_disk_that_is_too_small(monkeypatch):
    free = shutil.disk_usage("/")._replace(free=123_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    wanted = temporary_folder(2_000_000_000, "the model")
    with pytest.raises(ValueError, match=r"the model needs 2\.00 GB in .*, which has 0\.12 GB free"), wanted:
        pass


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_end_before_the_end_leaves_nothing_behind(tmp_path, number, code):
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tritkit.cli import main\n"
        "sys.exit(main(['bench', '--shape', 'bitnet-tiny', '--repeat', '10000']))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "TMPDIR": str(tmp_path)})
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/model.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(1.0)  # now it measures
    process.send_signal(number)
    assert process.wait(timeout=30) == code
    assert list(tmp_path.iterdir()) == []


class Adder:
    """What the test below runs in another process."""

    def __init__(self, start: int):
        if start < 0:
            raise ValueError("start is negative")
        self.sum = start

    def add(self, n: int) -> int:
        if n < 0:
            raise ValueError("n is negative")
        self.sum += n // (0 if n == 13 else 1)
        return self.sum

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_child_answers_and_its_errors_arrive():
    with Child("the sum", Adder, 5) as child:
        assert child.call("add", 2) == 7
        with pytest.raises(ValueError, match="n is negative"):
            child.call("add", -1)
        with pytest.raises(RuntimeError, match=r"the process of the sum failed[\s\S]*ZeroDivisionError"):
            child.call("add", 13)
        assert child.call("add", 1) == 8
        with pytest.raises(ValueError, match="the process of the sum was killed"):
            child.call("die")
    with pytest.raises(ValueError, match="start is negative"):
        Child("the sum", Adder, -1)


def test_slow_samples_do_not_count_where_others_do():
    stolen, waiting = Sample(4.0, 0.9 * PEAK, 0.0, None), Sample(5.0, PEAK, 0.02, None)
    quiet = [Sample(2.0, PEAK, 0.001, None), Sample(2.5, PEAK, 0.0, None), Sample(1.0, PEAK, 0.002, None)]
    found = Samples("decode", 100, [stolen, *quiet, waiting]).summary(2, MACHINE)
    assert found["decode_tok_s"] == pytest.approx((50 + 40) / 2)  # the two least disturbed, not the fastest
    assert found["decode_sd"] == pytest.approx(50**0.5)
    assert (found["decode_samples"], found["decode_slow_samples"], found["decode_slow_counted"]) == (2, 2, 0)
    assert found["decode_joules"] is None
    few = Samples("decode", 100, [stolen, waiting, quiet[0]]).summary(2, MACHINE)
    assert few["decode_tok_s"] == pytest.approx((50 + 20) / 2)
    assert (few["decode_samples"], few["decode_slow_samples"], few["decode_slow_counted"]) == (2, 2, 1)


def test_the_shares_of_the_roofline():
    config, work = SHAPES["bitnet-2b4t"], Work(batch=2)
    prefill, decode = Sample(1.0, PEAK, 0.0, 64.0), Sample(4.0, PEAK, 0.0, 128.0)
    samples = [Samples("prefill", 512, [prefill]), Samples("decode", 256, [decode])]
    row = report({"weight_bytes": 6e8, "kv_bytes": 76_800}, samples, 5, MACHINE, config, work, 700.0)
    assert row["decode_tok_s"] == 64 and row["prefill_tok_s"] == 512
    assert row["bytes_per_token"] == 3e8 + 76_800 * 64.5  # the weights are read once for both sequences
    assert row["roofline_share"] == pytest.approx(row["bytes_per_token"] * 64 / 50e9)
    assert row["prefill_share"] == pytest.approx(2 * 2_084_044_800 * 512 / 2000e9)
    assert row["decode_joules"] == 0.5 and row["prefill_joules"] == 0.125
    unknown = report({"isa": "torch"}, samples, 5, MACHINE, SHAPES["llama-tiny"], work, 700.0)
    assert unknown["bytes_per_token"] is unknown["roofline_share"] is unknown["prefill_share"] is None


def test_what_looks_at_the_machine_add_up_to():
    def look(one: float, four: float, thread: float = 500.0, waited: float = 0.0) -> Look:
        return Look({(1, 0): [one, one], (4, 2048): [four, four - 2, four]}, [thread, 500.0], thread, waited)

    machine = machine_of([look(9, 12), look(9, 14), look(9, 5, thread=400.0), look(2, 3, waited=0.1)])
    assert machine == Machine(13.0, 14.0, streams=4, ahead=2048, int8_gops=1000.0, threads=2)
    busy = machine_of([look(9, 12, waited=0.1), look(9, 14, waited=0.1)])
    assert busy.stream_gb_s == 14.0


def test_ratios_are_over_the_last_row():
    found = {"int4": (30.0, 200.0), "int6": (20.0, 200.0), "q6_k": (10.0, 50.0)}
    rows = [{"head": head, "decode_tok_s": d, "prefill_tok_s": p} for head, (d, p) in found.items()]
    assert ratios(rows) == {"decode": 3.0, "prefill": 4.0, "decode int6": 2.0, "prefill int6": 4.0}


def test_energy_is_read_where_it_can_be(tmp_path):
    for zone, label in (("0", "package-0"), ("0:0", "core"), ("1", "psys"), ("2", "package-1")):
        folder = tmp_path / f"intel-rapl:{zone}"
        folder.mkdir()
        (folder / "name").write_text(label)
        if zone != "2":  # that one is closed to us
            (folder / "energy_uj").write_text("900")
            (folder / "max_energy_range_uj").write_text("1000")
    counters = energy_counters(tmp_path)
    assert [file.parent.name for file, _ in counters] == ["intel-rapl:0"]
    stopwatch = Stopwatch(1)
    stopwatch._counters = counters

    def work():
        (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100")  # wrapped
        yield

    assert stopwatch.time(work()).joules == pytest.approx(200e-6)
    assert energy_counters(tmp_path / "nothing") == []


def test_a_shape_from_end_to_end(capsys):
    arguments = ["--shape", "bitnet-tiny", "--prompt", "48", "--tokens", "6", "--repeat", "2", "--threads", "1"]
    found = bench(capsys, *arguments, "--context", "70", "--batch", "3", "--kv-bits", "8")
    assert tuple(found)[: len(KEYS)] == KEYS
    assert found["shape"] == "bitnet-tiny" and found["threads"] == 1 and found["isa"] == _native.default_isa()
    for key in ("decode_tok_s", "prefill_tok_s", "roofline_share", "prefill_share", "peak_rss_mib", "stream_gb_s"):
        assert found[key] > 0, key
    assert (found["prompt"], found["tokens"], found["context"], found["batch"]) == (48, 6, 70, 3)
    assert found["kv_bits"] == 8
    assert found["decode_samples"] >= 1 and found["peak_rss_mib"] < 400  # the reader's 512 MiB are not ours


def test_densities_beside_the_dense_layout(capsys):
    arguments = ["--shape", "bitnet-tiny", "--prompt", "8", "--tokens", "40", "--repeat", "1", "--threads", "1"]
    found = bench(capsys, *arguments, "--density", "50,50", "--density", "20,10")
    assert len(found["others"]) == 2 and "l64" not in found["others"][-1]["layout"]
    for row, (up, down) in zip(found["densities"], [(0.5, 0.5), (0.2, 0.1)], strict=True):
        assert row["up"] == pytest.approx(up, abs=0.05) and row["down"] == pytest.approx(down, abs=0.05)
        assert row["ideal"] > 1 and row["ffn_share"] < 1
    assert "DOWN" in refused(capsys, "--shape", "bitnet-tiny", "--density", "10,20")
    assert "cannot be used with --batch" in refused(
        capsys, "--shape", "bitnet-tiny", "--density", "5,5", "--batch", "2"
    )


def test_a_model_folder_is_recorded(capsys, make_folder):
    folder = make_folder("b158")
    sizes = ["--tokens", "4", "--repeat", "1"]
    found = bench(capsys, str(folder), *sizes)
    assert found["prompt"] == 128  # all of its context
    assert results.latest(folder)["native_decode_rate"] == found["decode_tok_s"]
    torch_ = bench(capsys, str(folder), *sizes, "--engine", "torch", "--json")
    assert torch_["isa"] == "torch" and torch_["bytes_per_token"] is None
    assert results.latest(folder)["torch_decode_rate"] == torch_["decode_tok_s"]


def test_refusals(capsys, make_folder, monkeypatch):
    folder = str(make_folder("b158"))
    assert "more than the model's context of 128" in refused(capsys, folder, "--prompt", "129")
    assert "8 tokens behind a context of 121" in refused(capsys, folder, "--context", "121", "--tokens", "8")
    assert "torch engine" in refused(capsys, folder, "--engine", "torch", "--kv-bits", "8")
    assert "batch is 0" in refused(capsys, folder, "--batch", "0")
    assert "not both" in refused(capsys, folder, "--shape", "bitnet-tiny")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    assert "3200 is no multiple" in refused(capsys, "--shape", "bitnet-3b", "--peer", "llama.cpp")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "pip install llama-cpp-python" in refused(capsys, "--shape", "bitnet-tiny", "--peer", "llama.cpp")


def test_the_reader_refuses_what_it_cannot_read():
    runner = _native.Runner(2, "scalar")
    reader = _native.MemoryReader(runner, 1 << 16)
    assert reader.read(8, 0) > 0
    for arguments, words in (((3, 0), "streams is 3"), ((1, -1), "ahead is -1")):
        with pytest.raises(ValueError, match=words):
            reader.read(*arguments)
    with pytest.raises(ValueError, match="too small"):
        _native.MemoryReader(runner, 512)
    assert all(rate > 0 for rate in _native.integer_peak(runner, 1e-4))


def test_what_is_read_is_real_memory():
    """Pages that were never written are all the same page, and it comes from the cache."""
    if not Path("/proc/self/statm").is_file():
        pytest.skip("this system does not say how much memory is resident")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    reader = _native.MemoryReader(_native.Runner(2, "scalar"), 64 << 20)
    assert resident() - before > 60 << 20
    assert reader.read(1, 0) > 0


def test_products_are_timed_and_drawn():
    runner = _native.Runner(1, "scalar")

    def linear(rows: int):
        return _native.Linear(
            runner, "hf_autobitlinear", np.zeros((rows // 4, 32), np.uint8), rows, 32, 1.0, "a8", None
        )

    seconds = _native.product_seconds(runner, [linear(16), linear(16)], 3, 4)
    assert len(seconds) == 4 and min(seconds) > 0
    with pytest.raises(ValueError, match="several shapes"):
        _native.product_seconds(runner, [linear(16), linear(32)], 3, 1)
    with pytest.raises(ValueError, match="nothing to multiply"):
        _native.product_seconds(runner, [], 1, 1)


def test_the_roofline_is_an_svg():
    import xml.etree.ElementTree as xml

    path = Path(__file__).parent.parent / "benchmarks" / "roofline.py"
    roofline = runpy.run_path(str(path))
    curves = roofline["curves_of"](SHAPES["bitnet-2b4t"])
    assert [(c.rows, c.columns) for c in curves] == [(2560, 2560), (640, 2560), (6912, 2560), (2560, 6912)]
    for curve in curves:
        curve.shares, curve.by_memory = [0.5] * 8, [True] * 8
    svg = xml.fromstring(roofline["draw_svg"]("a title", "a machine", curves))
    assert len(svg.findall("{http://www.w3.org/2000/svg}circle")) == 8 * len(curves)

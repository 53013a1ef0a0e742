"""The life of a native engine: what it refuses before it begins, its threads, its memory, forks, its end."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from decoder_reference import pack_ternary, random_decoder

from tritkit import _native
from tritkit.cli import main
from tritkit.engine import Job, native
from tritkit.engine.load import load
from tritkit.engine.native import NativeEngine
from tritkit.engine.weights import DecoderShape, DecoderWeights, LayerWeights, LinearWeights
from tritkit.memory import available_memory
from tritkit.pack import pack

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def status(field: str) -> int:
    """A number of /proc/self/status: threads, or bytes."""
    with open("/proc/self/status") as file:
        words = next(line for line in file if line.startswith(f"{field}:")).split()
    return int(words[1]) * (1024 if words[-1] == "kB" else 1)


def tokens_of(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 97, n).astype(np.int32)


def logits_of(engine: NativeEngine, tokens: np.ndarray) -> np.ndarray:
    sequence = engine.new()
    (logits,) = engine.step([Job(sequence, tokens, "last")])
    engine.free(sequence)
    return logits


@pytest.fixture(scope="module")
def weights():
    return random_decoder("bitnet", "ternary")[0]


@pytest.fixture
def many_cores(monkeypatch):
    monkeypatch.setattr(native, "usable_cores", lambda: 8)


# --- Mistakes: one sentence each, and nothing is left behind.


def test_wrong_numbers_of_threads(weights, monkeypatch):
    monkeypatch.setattr(native, "usable_cores", lambda: 2)
    with pytest.raises(ValueError, match=r"^threads is 3, but there are only 2 usable cores$"):
        NativeEngine(weights, threads=3)
    with pytest.raises(ValueError, match=r"^threads is -1, expected 0 \(all usable cores\) or more$"):
        NativeEngine(weights, threads=-1)


@linux
def test_out_of_memory_is_said_before_anything_is_copied(weights, monkeypatch, make_folder, capsys):
    threads = status("Threads")
    monkeypatch.setattr(native, "available_memory", lambda: 1000)
    with pytest.raises(MemoryError, match=r"^the weights need \d+ MiB of memory, but only 0 MiB are available$"):
        NativeEngine(weights, threads=2)
    assert status("Threads") == threads
    # A hidden size of 40 pads the rows of the embedding, which is also the head, so they are copied.
    folder = make_folder("llama", hidden_size=40)
    assert main(["generate", str(folder), "--prompt", "the", "--max-tokens", "2"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "tritkit: the weights need 0 MiB of memory, but only 0 MiB are available"
    ]


def test_what_is_needed_is_what_is_allocated(weights):
    runner = _native.Runner(1)
    for layer in weights.layers:
        for name in native.LINEARS:
            w = getattr(layer, name)
            built = _native.Linear(runner, w.layout, w.data, w.rows, w.cols, 1.0, w.activations, None)
            assert _native.runtime_bytes(runner, w.layout, w.data, w.rows, w.cols) == built.bytes > 0
    floats = np.zeros((7, 32), np.float32)
    assert _native.runtime_bytes(runner, "f32", floats, 7, 32) == 0  # read where they lie


CHANGES = {
    "hidden_size": 128,
    "intermediate_size": 161,
    "vocab_size": 321,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
}


@pytest.mark.parametrize("key", CHANGES)
@pytest.mark.parametrize("kind", ["llama", "b158"])
def test_a_file_that_does_not_fit_its_config(make_folder, tmp_path, kind, key):
    folder = make_folder(kind)
    if kind != "llama":
        pack(folder, tmp_path / "packed")
        folder = tmp_path / "packed"
    config = json.loads((folder / "config.json").read_text())
    assert config[key] != CHANGES[key]
    (folder / "config.json").write_text(json.dumps(config | {key: CHANGES[key]}))
    with pytest.raises(ValueError) as error:
        load(folder)
    assert "\n" not in str(error.value) and ("expected" in str(error.value) or "config.json" in str(error.value))


def test_a_file_that_was_cut_off(make_folder, capsys):
    folder = make_folder("b158")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert main(["generate", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.safetensors: tensor" in line and "which do not fit" in line


def test_rows_too_long_for_32_bits(weights):
    runner = _native.Runner(1)
    data = np.full((4, 32768), 0x55, np.uint8)
    with pytest.raises(ValueError, match="32768 columns, more than the 32767 whose products are sure to fit 32 bits"):
        _native.Linear(runner, "hf_bitlinear", data, 16, 32768, 1.0, "a8", None)


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("weight", [-1, 1])
def test_the_longest_rows_do_not_overflow(isa, weight):
    data = pack_ternary(np.full((16, 32767), weight, np.int8))
    for value in (-128, 127):
        for tokens in (1, 9):
            x = np.full((tokens, 32767), value, np.int8)
            found = _native.integer_product("hf_bitlinear", data, 16, 32767, x, isa)
            np.testing.assert_array_equal(found, np.full((tokens, 16), weight * value * 32767))


# --- Threads.


def test_no_core_is_busy_while_the_engine_is_idle(weights, many_cores):
    engine = NativeEngine(weights, threads=4)
    logits_of(engine, tokens_of(20))
    time.sleep(0.05)  # waiting spins for a moment before it sleeps
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05
    engine.close()


def test_engines_in_several_python_threads(weights, many_cores):
    engines = [NativeEngine(weights, threads=n) for n in (1, 2, 3)]
    texts = [tokens_of(40, seed) for seed in range(9)]
    expected = [logits_of(engines[0], text) for text in texts]
    found: dict[int, np.ndarray] = {}

    def work(i: int) -> None:
        found[i] = logits_of(engines[i % 3], texts[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(texts))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i, logits in enumerate(expected):
        np.testing.assert_array_equal(found[i], logits)


FORK = """
import os, sys, threading
sys.path.insert(0, {tests!r})
from test_native_life import NativeEngine, logits_of, native, random_decoder, tokens_of
native.usable_cores = lambda: 8
engine = NativeEngine(random_decoder("bitnet", "ternary")[0], threads=3)
expected = logits_of(engine, tokens_of(30))
stop = threading.Event()

def others():
    while not stop.is_set():
        logits_of(engine, tokens_of(200))

busy = threading.Thread(target=others)
if {busy}:
    busy.start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        same = (logits_of(engine, tokens_of(30)) == expected).all()
        grandchild = os.fork()
        if grandchild == 0:
            same = (logits_of(engine, tokens_of(30)) == expected).all()
            engine.close()
            os._exit(0 if same else 1)
        status = os.waitpid(grandchild, 0)[1]
        engine.close()
        os._exit(0 if same and status == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0, "the child computed something else"
    assert (logits_of(engine, tokens_of(30)) == expected).all()
unused = os.fork()
if unused == 0:
    engine.close()
    os._exit(0)
assert os.waitpid(unused, 0)[1] == 0
stop.set()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("busy", [False, True])
def test_an_engine_works_on_in_a_forked_child(busy):
    """Even where another thread was in the middle of a step."""
    code = FORK.format(tests=os.path.dirname(__file__), busy=busy)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# --- Memory and the end.


@linux
def test_close_frees_memory_and_threads(many_cores):
    weights = large_weights(lambda name, array: array)
    gc.collect()
    threads, before = status("Threads"), status("RssAnon")
    with NativeEngine(weights, threads=4) as engine:
        logits_of(engine, tokens_of(5))
        assert status("Threads") == threads + 3
        assert status("RssAnon") > before + 28 * MIB
    assert status("Threads") == threads
    assert status("RssAnon") < before + 5 * MIB
    engine.close()  # again does no harm
    for use in (engine.new, lambda: engine.length(0), lambda: engine.step([]), lambda: engine.bytes_per_token):
        with pytest.raises(ValueError, match=r"^the engine is closed$"):
            use()


def large_weights(place) -> DecoderWeights:
    """40 MiB of ternary codes and a table of 100 MiB. place(name, array) is the array to use."""
    hidden, inner, vocab = 2048, 8192, 12800

    def linear(name: str, rows: int, cols: int) -> LinearWeights:
        data = place(name, np.full((rows // 4, cols), 0b01_10_00_01, np.uint8))
        return LinearWeights("hf_autobitlinear", data, rows, cols, 0.01, "a8")

    sizes = {"q": (hidden, hidden), "k": (hidden, hidden), "v": (hidden, hidden), "o": (hidden, hidden),
             "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}  # fmt: skip
    layers = []
    for i in range(2):
        linears = {name: linear(f"{i}.{name}", *shape) for name, shape in sizes.items()}
        layers.append(LayerWeights(**linears, input_norm=ones(hidden), post_attention_norm=ones(hidden)))
    table = LinearWeights("f32", place("table", np.zeros((vocab, hidden), np.float32)), vocab, hidden)
    shape = DecoderShape(vocab, hidden, inner, 2, 16, 16, 128, ones(64), 1e-5, "silu", False, 4096)
    return DecoderWeights(shape, table, layers, ones(hidden), dataclasses.replace(table))


def ones(n: int) -> np.ndarray:
    return np.ones(n, np.float32)


LARGE = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np
from pathlib import Path
from test_native_life import Job, MIB, NativeEngine, large_weights, status, native
folder = Path({folder!r})

def mapped(name, array):
    array.tofile(folder / name)
    shape, dtype = array.shape, array.dtype
    del array
    return np.memmap(folder / name, dtype, "r").reshape(shape)

weights = large_weights(mapped)
before, files = status("VmRSS"), status("RssFile")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
engine = NativeEngine(weights, threads=1)
steady, peak = status("VmRSS"), status("VmHWM")
assert steady - before > 30 * MIB, "the codes were copied"
assert peak - steady < 24 * MIB, f"the peak is {{(peak - steady) / MIB:.0f}} MiB above the steady state"
assert status("RssFile") - files < 4 * MIB, "pages of the file stayed"

rows = np.random.default_rng(0).integers(0, weights.embedding.rows, 2000).astype(np.int32)
largest = 0
for start in range(0, len(rows), 100):
    engine.step([Job(engine.new(), rows[start : start + 100], "none")])
    largest = max(largest, status("RssFile") - files)
assert largest < 40 * MIB, f"{{largest / MIB:.0f}} MiB of the table are resident"
"""


@linux
def test_pages_of_the_file_are_given_back(tmp_path):
    code = LARGE.format(tests=os.path.dirname(__file__), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_floats_are_read_where_they_lie_and_stay_alive(tmp_path):
    """An engine keeps the mapping of a file whose arrays nobody else holds; odd addresses are no trouble."""
    weights = random_decoder("llama", "f32", hidden_size=64, intermediate_size=96)[0]
    path = tmp_path / "weights"

    def remapped(value):
        if isinstance(value, LinearWeights):
            offset = 1 + len(path.read_bytes()) if path.exists() else 1
            with open(path, "ab") as file:
                file.write(b"\0" + value.data.tobytes())
            data = np.memmap(path, np.uint8, "r", offset, (value.data.nbytes,)).view(value.data.dtype)
            return dataclasses.replace(value, data=data.reshape(value.data.shape))
        return value

    tokens = tokens_of(40)
    expected = logits_of(NativeEngine(weights, threads=1), tokens)
    layers = [
        dataclasses.replace(layer, **{name: remapped(getattr(layer, name)) for name in native.LINEARS})
        for layer in weights.layers
    ]
    head = None if weights.head is None else remapped(weights.head)
    engine = NativeEngine(
        dataclasses.replace(weights, layers=layers, embedding=remapped(weights.embedding), head=head), threads=1
    )
    del layers, head
    np.testing.assert_array_equal(logits_of(engine, tokens), expected)


# --- What the system says.


def test_available_memory(tmp_path):
    assert (available_memory() or 0) > 16 * MIB

    def system(files: dict[str, str]) -> int | None:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        return available_memory(root)

    machine = {"proc/meminfo": "MemTotal: 4000 kB\nMemAvailable: 3000 kB\n"}
    assert system(machine) == 3000 * 1024
    two = {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n",
           "sys/fs/cgroup/a/b/memory.current": "5\n", "sys/fs/cgroup/a/memory.max": "2000000\n",
           "sys/fs/cgroup/a/memory.current": "700000\n",
           "sys/fs/cgroup/a/memory.stat": "anon 300000\nfile 400000\n"}  # fmt: skip
    assert system(machine | two) == 2000000 - 700000 + 400000
    one = {"proc/self/cgroup": "5:cpu:/x\n4:memory:/x/y\n",
           "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000000\n",
           "sys/fs/cgroup/memory/memory.usage_in_bytes": "999999999\n"}  # fmt: skip
    assert system(machine | one) == 0

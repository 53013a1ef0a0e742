"""Damages small valid files at random and reads them: each has to be read, or refused with one sentence (ValueError).

    python tools/fuzz.py --count 200000          all readers, on all cores
    python tools/fuzz.py --reader gguf --seed 1 --only 4711    one input again, with its traceback

Found is: any other exception, a warning, a message that is no sentence of tritkit's, more than SECONDS, more memory
than the bounds below, and a process that dies. What is found is written to build/fuzz. Every input follows from the
seed, the reader and its number alone. The mutators are our own, since they know the formats.
"""

from __future__ import annotations

import argparse
import collections
import json
import linecache
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from fuzz_mutations import damage
from fuzz_seeds import every_seed

import tritkit
from tritkit.checkpoint import open_folder
from tritkit.engine.load import decoder_weights
from tritkit.gguf_model import open_gguf
from tritkit.gguf_tokenizer import tokenizer_from_llama2c, tokenizer_to_gguf
from tritkit.inspection import inspect
from tritkit.llama2c import open_llama2c
from tritkit.methods.importance import read_importance
from tritkit.models.shapes import matrix_names, matrix_shape
from tritkit.tokenizer import Tokenizer

SECONDS = 2.0  # of CPU, since other work on the machine is no fault of a reader
SILENCE = 60.0  # of the clock: a process that says nothing for so long hangs where no Python runs
# What Python and numpy allocate (tracemalloc): 4 times the file, and what a reader takes for a file of no size, above
# all JSON (a value of two bytes becomes an object of some 60) and numpy's blocks of decoded weights.
TIMES, SMALL = 4, 4 << 20
NATIVE = 64 << 20  # growth of the process by one input: what tokenizers' Rust allocates is not seen by tracemalloc
BOX = 4 << 30  # address space of a process beyond what it has at its start: an absurd allocation fails at once
SAMPLE = "The cat — naïve? 12\n  two owls "
HERE = Path(tritkit.__file__).parent


def _weights(model: Any) -> None:
    """What comes after opening, with models that claim no more than a small one has."""
    for name in matrix_names(model.config)[:8]:
        if np.prod(matrix_shape(model.config, name)) <= 1 << 18:
            model.floats(name)
    if model.config.weights is None or model.is_packed:
        decoder_weights(model)


def _words(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(SAMPLE)
    "".join(tokenizer.stream(ids[:50]))
    tokenizer_to_gguf(tokenizer, len(tokenizer))


def read_gguf(path: Path) -> None:
    model = open_gguf(path, "x86")
    _weights(model)
    _words(model.tokenizer())


def read_safetensors(path: Path) -> None:
    _weights(open_folder(path.parent))


def read_tokenizer(path: Path) -> None:
    _words(tokenizer_from_llama2c(path, 275) if path.suffix == ".bin" else Tokenizer.load(path.parent))


def read_config(path: Path) -> None:
    model = open_folder(path.parent)
    _weights(model)
    model.tokenizer()


def read_llama2c(path: Path) -> None:
    model = open_llama2c(path.with_name("model.bin"))
    _weights(model)
    model.tokenizer()


def read_imatrix(path: Path) -> None:
    read_importance(path).arrays()


def read_anything(path: Path) -> None:
    inspect(path.parent if path.suffix in (".json", ".safetensors") else path, "x86", linears=True)


READERS: dict[str, Callable[[Path], None]] = {
    "gguf": read_gguf,
    "safetensors": read_safetensors,
    "tokenizer": read_tokenizer,
    "config": read_config,
    "llama2c": read_llama2c,
    "imatrix": read_imatrix,
    "inspect": read_anything,
}


# Of the inputs: slow ones less.
SHARES = {"gguf": 3, "safetensors": 4, "tokenizer": 5, "config": 6, "llama2c": 2, "imatrix": 1, "inspect": 4}
Seeds = list[tuple[str, dict[str, bytes]]]  # the name of the file to damage, and all files of its folder


class TooLong(BaseException):
    pass


def make_input(reader: str, seed: int, number: int, seeds: Seeds) -> tuple[str, int, bytes]:
    """The damaged file's name, which seed it was, and its bytes."""
    chance = Random(f"{seed} {reader} {number}")
    which = chance.randrange(len(seeds))
    name, files = seeds[which]
    return name, which, damage(name, files[name], chance)


def complaint(error: ValueError) -> str | None:
    """What is wrong with a refusal; None where it is one sentence, raised by tritkit."""
    message = str(error)
    if type(error) is not ValueError:
        return f"{type(error).__name__} instead of ValueError"
    if not message or len(message) > 2000 or "\n" in message or any("\ud800" <= c <= "\udfff" for c in message):
        return "no sentence that can be printed"
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    file = frame.f_code.co_filename
    if not file.startswith(str(HERE)) or not linecache.getline(file, line).lstrip().startswith("raise "):
        return "a ValueError that tritkit did not raise"
    return None


def attempt(reader: str, path: Path, size: int) -> tuple[str, str]:
    """Read one input: ("read" or "refused" or what was found, its details)."""
    tracemalloc.reset_peak()
    before, resident = tracemalloc.get_traced_memory()[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    outcome, details = "read", ""
    try:
        try:
            READERS[reader](path)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except ValueError as error:
        wrong = complaint(error)
        outcome, details = ("refused", str(error)) if wrong is None else (wrong, traceback.format_exc())
    except TooLong:
        outcome, details = f"more than {SECONDS:g} s", traceback.format_exc()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        outcome, details = type(error).__name__, traceback.format_exc()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) * (1 if sys.platform == "darwin" else 1024)
    peak = tracemalloc.get_traced_memory()[1] - before
    if outcome in ("read", "refused") and peak > TIMES * size + SMALL:
        outcome, details = "too much memory", f"{peak} bytes for a file of {size}: {details}"
    elif outcome in ("read", "refused") and grown > NATIVE:
        outcome, details = "too much memory", f"the process grew by {grown} bytes for a file of {size}: {details}"
    return outcome, details


def work(link: Connection, reader: str, seed: int, numbers: range, seeds: list[Any], loud: bool) -> None:
    """Run these inputs; sends (number, outcome, details) for what was found, and counts now and then."""
    if not loud:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where Rust writes its panics
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    warnings.simplefilter("error")

    def stop(*_: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGPROF, stop)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * 4096 if Path("/proc/self/statm").exists() else 0
    if held:
        resource.setrlimit(resource.RLIMIT_AS, (held + BOX, resource.RLIM_INFINITY))
    tracemalloc.start()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as top:
        folders = [Path(top) / str(i) for i in range(len(seeds))]
        for folder, (_, files) in zip(folders, seeds, strict=True):
            folder.mkdir()
            for name, raw in files.items():
                (folder / name).write_bytes(raw)
            attempt(reader, folder / seeds[folders.index(folder)][0], 1 << 20)  # imports are nobody's memory
        counts: collections.Counter[str] = collections.Counter()
        for number in numbers:
            if sum(counts.values()) % 50 == 0:
                link.send((number, None, dict(counts)))
            name, which, raw = make_input(reader, seed, number, seeds)
            path = folders[which] / name
            path.unlink()  # a new file: the old one may still be mapped
            path.write_bytes(raw)
            total = max(len(raw), sum(map(len, seeds[which][1].values())))
            outcome, details = attempt(reader, path, total)
            counts[outcome] += 1
            if outcome not in ("read", "refused") or loud:
                link.send((number, outcome, details))
            path.unlink()
            path.write_bytes(seeds[which][1][name])
        link.send((numbers.stop, None, dict(counts)))


class Runner:
    """Processes on shares of the inputs; one that dies is replaced and goes on behind what killed it."""

    def __init__(self, seed: int, out: Path):
        self.seed, self.out, self.seeds = seed, out, every_seed()
        self.found: list[tuple[str, int, str]] = []
        self.counts: collections.Counter[str] = collections.Counter()

    def save(self, reader: str, number: int, outcome: str, details: str) -> None:
        name, which, raw = make_input(reader, self.seed, number, self.seeds[reader])
        folder = self.out / f"{reader}-{self.seed}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for other, content in {**self.seeds[reader][which][1], name: raw}.items():
            (folder / other).write_bytes(content)
        report = f"{name}: {outcome}\n{details}\n"
        (folder / "FOUND.txt").write_text(report, encoding="utf-8", errors="backslashreplace")
        self.found.append((reader, number, outcome))
        print(f"{reader} {number}: {outcome}; {folder}", flush=True)

    def run(self, reader: str, first: int, count: int, processes: int, loud: bool = False) -> None:
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        running: dict[Connection, dict[str, Any]] = {}

        def start(numbers: range) -> None:
            ours, theirs = context.Pipe(duplex=False)
            job = (theirs, reader, self.seed, numbers, self.seeds[reader], loud)
            process = context.Process(target=work, args=job, daemon=True)
            process.start()
            theirs.close()
            running[ours] = {"process": process, "numbers": numbers, "heard": time.monotonic(), "at": numbers.start}
            running[ours]["counts"] = {}

        for i in range(processes):
            start(range(first + i, first + count, processes))
        while running:
            for link in wait(list(running), timeout=1):
                state = running[link]  # type: ignore[index]
                try:
                    number, outcome, details = link.recv()  # type: ignore[union-attr]
                except EOFError:
                    self._end(reader, running.pop(link), start)  # type: ignore[arg-type]
                    continue
                state["heard"] = time.monotonic()
                if outcome is None:
                    state["at"], state["counts"] = number, details
                elif loud:
                    print(f"{reader} {number}: {outcome}\n{details}")
                else:
                    self.save(reader, number, outcome, details)
            for state in running.values():
                if time.monotonic() - state["heard"] > SILENCE:
                    state["process"].kill()

    def _end(self, reader: str, state: dict[str, Any], start: Callable[[range], None]) -> None:
        state["process"].join()
        self.counts.update({f"{reader} {outcome}": n for outcome, n in state["counts"].items()})
        numbers = state["numbers"]
        if state["at"] >= numbers.stop:
            return
        block = range(state["at"], min(numbers.stop, state["at"] + 50 * numbers.step), numbers.step)
        killer = self._killer(reader, block)
        if killer is not None:
            self.save(reader, killer[0], killer[1], "the process that read it")
        start(range(block[-1] + numbers.step, numbers.stop, numbers.step))

    def _killer(self, reader: str, block: range) -> tuple[int, str] | None:
        """Which of these inputs ends a process: each in one of its own."""
        for number in block:
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
            _, theirs = context.Pipe(duplex=False)
            job = (theirs, reader, self.seed, range(number, number + 1), self.seeds[reader], False)
            process = context.Process(target=work, args=job, daemon=True)
            process.start()
            theirs.close()
            process.join(SILENCE)
            if process.is_alive():
                process.kill()
                return number, "hangs"
            if process.exitcode:
                return number, f"dies with {process.exitcode}"
        return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reader", choices=READERS, action="append", help="only this one (may be given again)")
    parser.add_argument("--count", type=int, default=200_000, help="inputs in all (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--only", type=int, help="the number of one input, with what comes of it")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    options = parser.parse_args(arguments)
    runner = Runner(options.seed, options.out)
    readers = options.reader or list(READERS)
    begun = time.monotonic()
    if options.only is not None:
        for reader in readers:
            runner.run(reader, options.only, 1, 1, loud=True)
        return 0
    done, weights = 0, [SHARES[reader] for reader in readers]
    for i, reader in enumerate(readers):
        share = options.count * sum(weights[: i + 1]) // sum(weights) - done
        done += share
        start = time.monotonic()
        runner.run(reader, 0, share, options.processes)
        rate = share / (time.monotonic() - start)
        read, refused = (runner.counts[f"{reader} {outcome}"] for outcome in ("read", "refused"))
        print(f"{reader}: {share} inputs, {read} read, {refused} refused, {rate:.0f} a second", flush=True)
    seconds = time.monotonic() - begun
    rate = options.count / seconds
    print(f"{options.count} inputs in {seconds:.0f} s, {rate:.0f} a second, {len(runner.found)} found")
    if runner.found:
        (options.out / "found.json").write_text(json.dumps(runner.found, indent=1))
    return 1 if runner.found else 0


if __name__ == "__main__":
    sys.exit(main())

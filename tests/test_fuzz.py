"""A short run of tools/fuzz.py (make fuzz runs 200,000 inputs), and that it sees what it is there to see."""

import importlib
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).parent.parent / "tools"
INPUTS = 2000
fuzz = None


@pytest.fixture(autouse=True)
def module(monkeypatch):
    global fuzz
    monkeypatch.syspath_prepend(str(TOOLS))
    fuzz = importlib.import_module("fuzz")


@pytest.fixture
def runner(tmp_path):
    return fuzz.Runner(0, tmp_path)


def test_damaged_files_are_read_or_refused(runner):
    for reader in fuzz.READERS:
        runner.run(reader, 0, INPUTS // len(fuzz.READERS), 2)
    assert not runner.found
    for reader in fuzz.READERS:
        read, refused = (runner.counts[f"{reader} {outcome}"] for outcome in ("read", "refused"))
        assert read + refused == INPUTS // len(fuzz.READERS)
        assert min(read, refused) > INPUTS // 100  # damage neither stops at the first check nor does nothing


def test_inputs_follow_from_the_seed(runner):
    again = fuzz.Runner(0, runner.out)
    for reader in fuzz.READERS:
        for number in (0, 7, 7, 300):
            first = fuzz.make_input(reader, 0, number, runner.seeds[reader])
            assert fuzz.make_input(reader, 0, number, again.seeds[reader]) == first
            assert fuzz.make_input(reader, 1, number, runner.seeds[reader]) != first


def allocates(path):
    np.zeros(fuzz.SMALL + 8 * path.stat().st_size, np.uint8)


def takes_long(path):
    start = time.process_time()
    while time.process_time() < start + 2 * fuzz.SECONDS:
        pass


def from_elsewhere(path):
    int("no number")


def in_two_lines(path):
    raise ValueError("one\ntwo")


def dies(path):
    os._exit(7)


def warns(path):
    np.float32(1) / np.float32(0)


BAD = {
    "too much memory": allocates,
    "more than 2 s": takes_long,
    "a ValueError that tritkit did not raise": from_elsewhere,
    "no sentence that can be printed": in_two_lines,
    "dies with 7": dies,
    "RuntimeWarning": warns,
    "RecursionError": lambda path: BAD["RecursionError"](path),
}


@pytest.mark.skipif(sys.platform != "linux", reason="the reader that is put in its place comes by fork")
@pytest.mark.parametrize("outcome", BAD)
def test_what_is_bad_is_found(runner, monkeypatch, outcome):
    def sometimes(path):
        if path.read_bytes() != good:
            BAD[outcome](path)

    good = runner.seeds["llama2c"][0][1]["model.bin"]
    monkeypatch.setattr(runner, "seeds", {"llama2c": runner.seeds["llama2c"][:1]})
    monkeypatch.setitem(fuzz.READERS, "llama2c", sometimes)
    runner.run("llama2c", 0, 2, 1)
    assert (("llama2c", 0, outcome) in runner.found) and len(runner.found) <= 2
    saved = runner.out / "llama2c-0-0"
    assert outcome in (saved / "FOUND.txt").read_text()
    assert (saved / "model.bin").read_bytes() == fuzz.make_input("llama2c", 0, 0, runner.seeds["llama2c"])[2]

"""A half-written file never replaces a good one."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from tritkit.files import atomic_open


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(("mode", "content"), [("w", "new é\n"), ("wb", b"\x00new\xff")])
def test_writing(tmp_path, mode, content):
    path = tmp_path / "a"
    for _ in range(2):
        with atomic_open(path, mode) as file:
            file.write(content)
    assert path.read_bytes() == (content if mode == "wb" else content.encode("utf-8"))
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt(), ValueError("x")])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_open(path) as file:
        file.write("half")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["a"]


def test_an_error_of_the_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"), atomic_open(path) as file:
        file.write("new")
    assert path.read_text() == "old" and names(tmp_path) == ["a"]


def test_the_old_file_is_there_until_the_end(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with atomic_open(path) as file:
        file.write("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    code = (
        "import os, signal; from tritkit.files import atomic_open\n"
        f"with atomic_open({str(path)!r}) as f: f.write('half'); f.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"), atomic_open(tmp_path / "nowhere" / "a"):
        pass

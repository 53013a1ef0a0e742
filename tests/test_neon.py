"""The kernels for 64-bit ARM equal the scalar ones: cross-compiled and emulated, or run where there is such a CPU."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NATIVE = platform.machine() in ("aarch64", "arm64")
TOOLS = ["make", "g++"] if NATIVE else ["make", "aarch64-linux-gnu-g++", "qemu-aarch64"]


@pytest.mark.slow
def test_kernels_on_arm():
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed (Debian: g++-aarch64-linux-gnu, qemu-user)")
    here = ["NEON_CXX=g++", "NEON_RUN="] if NATIVE else []
    done = subprocess.run(["make", "neon", *here], cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "scalar: done" in lines
    assert "neon: done" in lines
    assert lines[-1] == "0 failures"

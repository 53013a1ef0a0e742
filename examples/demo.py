"""The whole path once: a story, three small models trained from scratch, packed, run natively, compared.

    make demo        (or: python examples/demo.py [OUT])

Every step is a tritkit command and is printed before it runs, so that it can be run again by itself. Step counts are
fixed; on 2 cores all of it takes a few minutes.
"""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = {"llama": "full precision", "b158": "BitNet b1.58", "b1": "BitNet b1"}
PROMPT = "Once upon a time"
phases: list[tuple[str, float]] = []


def tritkit(*arguments: str) -> None:
    """Run one verb in a process of its own, so that its peak of memory is its own."""
    print(f"\n$ tritkit {' '.join(repr(a) if ' ' in a else a for a in arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "tritkit", *arguments], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)


class Phase:
    """Time what happens inside and remember it for the summary."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        print(f"\n=== {self.name}", flush=True)
        self.start = time.monotonic()

    def __exit__(self, *error: object) -> None:
        phases.append((self.name, time.monotonic() - self.start))


def main(out: Path) -> None:
    with Phase("a story from the bundled model, at once"):
        tritkit("generate", "--prompt", PROMPT, "--max-tokens", "200", "--temperature", "0.6", "--seed", "2")
    for name, title in MODELS.items():
        with Phase(f"train {title} from scratch"):
            again = ("--overwrite",) if (ROOT / out / name / "config.json").exists() else ()
            tritkit("train", f"configs/demo-{name}.toml", str(out / name), f"--data.cache={out / 'tokens'}", *again)
    folders = {"llama": str(out / "llama")}
    with Phase("pack the two low-bit models"):
        for name in ("b158", "b1"):
            folders[name] = str(out / f"{name}-packed")
            tritkit("pack", str(out / name), folders[name], "--overwrite")
    with Phase("generate natively"):
        for name in MODELS:
            tritkit("generate", folders[name], "--prompt", PROMPT, "--max-tokens", "60", "--seed", "1")
    with Phase("perplexity on held-out books"):
        for name in MODELS:
            tritkit("eval", folders[name])
    with Phase("speed and memory"):
        for name in MODELS:
            for engine in ("native", "torch"):
                tritkit("bench", folders[name], "--engine", engine)
    with Phase("compare"):
        tritkit("compare", *folders.values())
    print("\nwall time by phase:")
    for name, seconds in phases:
        print(f"  {seconds:6.1f} s  {name}")
    print(f"  {sum(s for _, s in phases):6.1f} s  together")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))

"""Make the model that ships with tritkit, its full-precision twin and the baselines that it must beat.

python tools/make_bundled.py BOOKS_FOLDER [RUNS_FOLDER]     (relative to the repository, default runs)

BOOKS_FOLDER holds kids_train.txt.xz, books_train_{0,1,2}.txt.xz and books_val.txt (documents divided by lines of
<|endoftext|>); see tritkit/bundled/text/SOURCES.md. Training takes hours on two cores and goes on after a stop; what is
finished is not trained again.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ("kids_train.txt.xz", "books_train_0.txt.xz", "books_train_1.txt.xz", "books_train_2.txt.xz")
HELD_OUT = Path("tritkit/bundled/text/held_out.txt.xz")


def run(*arguments: object) -> None:
    print(f"\n$ python -m {' '.join(map(str, arguments))}", flush=True)
    subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=ROOT, check=True)


def train(config: str, out: Path, books: list[Path], cache: Path, *more: str) -> None:
    if (ROOT / out / "config.json").exists() and not (ROOT / out / "training").exists():
        print(f"{out} is finished")
        return
    data = [f"--data={book}" for book in books]
    run("tritkit", "train", f"configs/{config}.toml", out, *data, f"--data.cache={cache}", *more)


def main(books: Path, runs: Path) -> None:
    files = [books / name for name in TRAIN]
    for name in ("bundled", "bundled-twin"):  # all books, then more of the children's books
        first, second = runs / name, runs / f"{name}-2"
        train(name, first, files, runs / "tokens")
        train(f"{name}-2", second, files[:2], runs / "tokens-2", f"--train.init={first}")
    model = Path("tritkit/bundled/model")
    run("tritkit", "pack", runs / "bundled-2", model, "--overwrite")
    for folder in (model, runs / "bundled-twin-2"):
        run("tritkit", "eval", folder)
        run("tritkit", "bench", folder)
    run("tritkit", "compare", model, runs / "bundled-twin-2")
    tokenizer = model / "tokenizer.json"
    run("tritkit.evals.ngram", "--tokenizer", tokenizer, "--held-out", HELD_OUT, "--train", *files)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2] if len(sys.argv) > 2 else "runs"))

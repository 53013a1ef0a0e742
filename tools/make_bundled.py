"""Make the model that ships with tritkit, its full-precision twin and the baselines that it must beat.

python tools/make_bundled.py BOOKS_FOLDER [RUNS_FOLDER]

BOOKS_FOLDER holds kids_train.txt.xz, books_train_{0,1,2}.txt.xz and books_val.txt (documents divided by lines of
<|endoftext|>); see tritkit/bundled/text/SOURCES.md. Training takes hours on two cores and goes on after a stop; what is
finished is not trained again.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ("kids_train.txt.xz", "books_train_0.txt.xz", "books_train_1.txt.xz", "books_train_2.txt.xz")
HELD_OUT = ROOT / "tritkit" / "bundled" / "text" / "held_out.txt.xz"


def run(*arguments: object) -> None:
    print(f"\n$ python -m {' '.join(map(str, arguments))}", flush=True)
    subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=ROOT, check=True)


def main(books: Path, runs: Path) -> None:
    data = [f"--data={books / name}" for name in TRAIN]
    for name in ("bundled", "bundled-twin"):
        finished = (runs / name / "config.json").exists() and not (runs / name / "training").exists()
        if not finished:
            run("tritkit", "train", f"configs/{name}.toml", runs / name, *data, f"--data.cache={runs / 'tokens'}")
    model = ROOT / "tritkit" / "bundled" / "model"
    run("tritkit", "pack", runs / "bundled", model, "--overwrite")
    for folder in (model, runs / "bundled-twin"):
        run("tritkit", "eval", folder)
        run("tritkit", "eval", folder, "--data", books / "books_val.txt", "--no-record")
        run("tritkit", "bench", folder)
    run("tritkit", "compare", model, runs / "bundled-twin")
    train = [str(books / name) for name in TRAIN]
    for held_out in (HELD_OUT, books / "books_val.txt"):
        tokenizer = model / "tokenizer.json"
        run("tritkit.evals.ngram", "--tokenizer", tokenizer, "--held-out", held_out, "--train", *train)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2] if len(sys.argv) > 2 else ROOT / "runs").resolve())

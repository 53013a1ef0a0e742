"""Cut the texts that ship with tritkit from a folder of public-domain books. See tritkit/bundled/text/SOURCES.md.

python tools/cut_bundled_text.py BOOKS_FOLDER

BOOKS_FOLDER holds kids_train.txt.xz, books_val.txt (documents divided by lines of <|endoftext|>) and index.tsv
(split, author, title, year, characters).
"""

import lzma
import sys
from pathlib import Path

from tritkit.data import SEPARATOR, documents

TRAIN = (  # simple English, 5.17 MB
    "The Wonderful Wizard of Oz",
    "The Marvelous Land of Oz",
    "Ozma of Oz",
    "Dorothy and the Wizard in Oz",
    "The Life and Adventures of Santa Claus",
    "Alice's Adventures in Wonderland",
    "Through the Looking-Glass",
    "Peter Pan",
    "The Secret Garden",
    "A Little Princess",
    "The Adventures of Pinocchio",
    "The Story of Doctor Dolittle",
    "The Wind in the Willows",
    "The Princess and the Goblin",
    "Andersen's Fairy Tales",
    "The Railway Children",
    "Five Children and It",
    "The Book of Dragons",
    "Black Beauty",
    "Heidi",
    "The Boxcar Children",
)
HELD_OUT_CHARACTERS = 60_000  # from the start of each held-out book


def main(folder: Path) -> None:
    rows = [line.split("\t") for line in (folder / "index.tsv").read_text().splitlines()]
    sizes = {title: int(size) for split, _, title, _, size in rows if split == "kids"}
    books = list(documents([folder / "kids_train.txt.xz"]))
    by_size = {}
    for title in TRAIN:
        near = [book for book in books if abs(len(book.strip()) - sizes[title]) <= 4]
        assert len(near) == 1, f"{title}: {len(near)} books of about {sizes[title]} characters"
        by_size[title] = near[0]
    out = Path(__file__).parent.parent / "tritkit" / "bundled" / "text"
    write(out / "train.txt.xz", list(by_size.values()))
    held_out = [book[: book.rfind("\n", 0, HELD_OUT_CHARACTERS) + 1] for book in documents([folder / "books_val.txt"])]
    write(out / "held_out.txt.xz", held_out)


def write(path: Path, texts: list[str]) -> None:
    text = f"{SEPARATOR}\n".join(t if t.endswith("\n") else t + "\n" for t in texts)
    path.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{path.name}: {len(texts)} books, {len(text.encode()) / 1e6:.2f} MB of text, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Text to documents, documents to tokens, tokens to batches; a user's mistake gets one sentence."""

import gzip
import json
import lzma
import re
import subprocess
import sys

import numpy as np
import pytest
import zstandard

from tritkit.data import Batches, documents, find_files, holdout, text_key, tokenize

DOCUMENTS = ["First line.\nSecond line.\n", "Café — naïve?\n", "Last, without an end 🌙"]
PLAIN = "<|endoftext|>\n".join(DOCUMENTS)
LINES = "".join(json.dumps({"text": d, "body": d.upper(), "n": 1}) + "\n" for d in DOCUMENTS)
COMPRESS = {
    "": lambda b: b,
    ".xz": lzma.compress,
    ".gz": gzip.compress,
    ".zst": lambda b: zstandard.ZstdCompressor().compress(b),
}


def one_sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 250
    return text


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_kind_of_file(tmp_path, suffix):
    plain, lines = tmp_path / f"a.txt{suffix}", tmp_path / f"b.jsonl{suffix}"
    plain.write_bytes(COMPRESS[suffix](PLAIN.encode()))
    lines.write_bytes(COMPRESS[suffix](LINES.encode() + b"\n"))
    assert list(documents([plain])) == DOCUMENTS
    assert list(documents([str(lines)])) == DOCUMENTS
    assert list(documents([lines], "body")) == [d.upper() for d in DOCUMENTS]
    assert list(documents([plain, lines])) == DOCUMENTS * 2


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".zst"])
def test_files_that_were_joined_are_read_to_the_end(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](b"one\n<|endoftext|>\n") + COMPRESS[suffix](b"two\n"))
    assert list(documents([path])) == ["one\n", "two\n"]


def test_separators(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"<|endoftext|>\r\na <|endoftext|> b\n<|endoftext|>\n \n<|endoftext|>\nc\n<|endoftext|>\n")
    assert list(documents([path])) == ["a <|endoftext|> b\n", "c\n"]


def test_folders_files_and_globs(tmp_path):
    names = ["b.txt", "a.jsonl", "deep/er/c.txt.xz", "deep/d.txt.gz", "note.md", "e.txt.zst"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.txt").mkdir()
    wanted = sorted(tmp_path / n for n in names if n != "note.md")
    assert find_files([str(tmp_path)]) == wanted
    assert find_files([f"{tmp_path}/**/*.gz", f"{tmp_path}/b.txt", str(tmp_path / "deep")]) == [
        tmp_path / "deep/d.txt.gz",
        tmp_path / "b.txt",
        tmp_path / "deep/er/c.txt.xz",
    ]
    assert find_files([f"{tmp_path}/*.txt"]) == [tmp_path / "b.txt"]
    (tmp_path / "empty").mkdir()
    for source, message in [
        ("nowhere.txt", "there is no file .*nowhere.txt"),
        ("*.csv", r"there is no file .*\*.csv"),
        ("note.md", "note.md is no text file"),
        ("empty", "the folder .*empty holds no text"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            find_files([str(tmp_path / source)])
        one_sentence(error)


LONG = b"good line\n" * 3000
MUCH = np.random.default_rng(0).bytes(360_000).hex("\n", 40).encode()  # several blocks of zstd
DAMAGED = {
    "empty.txt": (b"", "is empty"),
    "blank.txt": (b" \n<|endoftext|>\n\n", "is empty"),
    "empty.jsonl": (b"\n\n", "is empty"),
    "binary.txt": (b"text\n\0\1\2\n", "zero bytes"),
    "latin.txt": ("café".encode("latin-1"), "not UTF-8"),
    "late.txt": (LONG + b"\xff\n", "not UTF-8.* line"),
    "cut.txt.xz": (lzma.compress(LONG)[:-20], "damaged"),
    "flip.txt.xz": (lzma.compress(LONG)[:60] + b"\0\0\0\0" + lzma.compress(LONG)[64:], "damaged"),
    "not.txt.xz": (b"plain text", "damaged or not compressed"),
    "not.txt.gz": (b"plain text", "damaged or not compressed"),
    "cut.txt.gz": (gzip.compress(LONG)[:-12], "damaged"),
    "flip.txt.gz": (gzip.compress(LONG)[:20] + b"\xff" * 8 + gzip.compress(LONG)[28:], "damaged"),
    "not.txt.zst": (b"plain text", "damaged or not compressed"),
    "cut.txt.zst": (zstandard.compress(MUCH)[:100000], "damaged"),
    "end.txt.zst": (zstandard.compress(MUCH)[:-1], "damaged"),
    "more.txt.zst": (zstandard.compress(MUCH) + b"more", "damaged"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    "list.jsonl": (b"[1]\n", "line 1 has no text in the field 'text'"),
    "field.jsonl": (b'{"body": "a", "n": 1}\n', "field 'text' .*body, n.*--text-field"),
    "number.jsonl": (b'{"text": 3}\n', "field 'text'"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_text_is_one_sentence(tmp_path, name):
    content, message = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        list(documents([tmp_path / name]))
    path, _, what = one_sentence(error).partition(name)
    assert path.endswith("/") and re.search(message, what)


def texts(count=7):
    return [f"Document {i}: " + "the cat sat on a mat. " * (i % 5 + 1) + "é\n" for i in range(count)]


def test_token_stream(tmp_path, tokenizer):
    stream = tokenize(iter(texts()), tokenizer, tmp_path / "t", "key")
    expected = [i for t in texts() for i in [*tokenizer.encode(t), tokenizer.eos_id]]  # encode adds BOS
    assert stream.ids.tolist() == expected and stream.ids.dtype == np.uint16
    assert expected.count(tokenizer.bos_id) == expected.count(tokenizer.eos_id) == 7 == stream.documents
    assert stream.utf8_bytes == sum(len(t.encode()) for t in texts())


def test_tokens_are_cached_by_key(tmp_path, tokenizer):
    def never():
        raise AssertionError("the text was read again")
        yield

    seen = []
    first = tokenize(iter(texts()), tokenizer, tmp_path / "t", "a", seen.append)
    assert sum(seen) == first.utf8_bytes
    again = tokenize(never(), tokenizer, tmp_path / "t", "a")
    assert np.array_equal(first.ids, again.ids)
    assert (again.documents, again.utf8_bytes) == (first.documents, first.utf8_bytes)
    assert len(tokenize(iter(texts(1)), tokenizer, tmp_path / "t", "b").ids) < len(first.ids)


def test_no_half_written_tokens(tmp_path, tokenizer):
    def broken():
        yield from texts(3)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        tokenize(broken(), tokenizer, tmp_path / "t", "a")
    assert list(tmp_path.iterdir()) == []


def test_key_changes_with_all_that_changes_tokens(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("x")
    keys = {text_key([path], "how", tokenizer), text_key([path], "other", tokenizer), text_key([path], "how", None)}
    assert text_key([path], "how", tokenizer) in keys
    path.write_text("xy")
    keys.add(text_key([path], "how", tokenizer))
    assert len(keys) == 4


@pytest.mark.parametrize("count", [1, 7, 49, 50, 60, 1000])
@pytest.mark.parametrize("share", [0.02, 0.3])
def test_holdout_is_a_partition_and_holds_something_out(count, share):
    all_texts = [f"{t}{i}\n" * 9 for i, t in enumerate(texts(count))]
    kept, held = (list(holdout(iter(all_texts), share, side)) for side in (False, True))
    size = sum(map(len, held)) / sum(map(len, all_texts))
    assert size > 0 and sum(map(len, kept))
    if count < 50:
        assert [k + h for k, h in zip(kept, held, strict=True)] == all_texts
        assert size < share + 0.2
    else:
        assert sorted(kept + held) == sorted(all_texts) and not set(kept) & set(held)
        assert count < 1000 or size == pytest.approx(share, rel=0.4)


def test_holdout_keeps_near_its_share_whatever_the_lines():
    """A title and then one line of all the rest: the cut goes into the line rather than hold out everything."""
    text = "Title\n" + "word " * 2000
    (held,) = holdout(iter([text]), 0.02, True)
    assert 0.01 < len(held) / len(text) < 0.05


def test_something_is_held_out_of_any_50_documents():
    for start in range(0, 10_000, 50):
        assert list(holdout((f"text {i}" for i in range(start, start + 50)), 0.02, True))


def test_the_same_document_stays_on_its_side():
    many = [f"document {i}" for i in range(400)]
    held = set(holdout(iter(many), 0.1, True))
    reordered = set(holdout(iter(sorted(many, reverse=True)), 0.1, True))
    assert len(held ^ reordered) <= 2  # the one that is held out so that there is any


IDS = np.arange(1000, dtype=np.uint16)


def test_batches_are_a_pure_function():
    a, b = (Batches(IDS, 16, 4, seed=3) for _ in range(2))
    later = [a[t] for t in (9, 2, 40)]
    for t, (x, y) in zip((9, 2, 40), later, strict=True):
        assert np.array_equal(x, b[t][0]) and np.array_equal(y, b[t][1])
    assert x.shape == y.shape == (4, 16) and x.dtype == np.int64
    assert not np.array_equal(Batches(IDS, 16, 4, seed=4)[0][0], a[0][0])
    code = (
        "import numpy as np; from tritkit.data import Batches\n"
        "print(Batches(np.arange(1000, dtype=np.uint16), 16, 4, 3)[40][0][:, 0].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert json.loads(done.stdout) == a[40][0][:, 0].tolist()


@pytest.mark.parametrize("size", [32, 33, 47, 48, 1000])
def test_targets_are_inputs_shifted_and_every_window_comes_once_an_epoch(size):
    batches = Batches(IDS[:size], 16, 1, seed=0)
    epoch = (size - 16) // 16
    offsets = set()
    for e in range(6):
        starts = []
        for t in range(e * epoch, (e + 1) * epoch):
            x, y = batches[t]
            assert np.array_equal(y, x + 1) and np.array_equal(x[0], x[0, 0] + np.arange(16))
            starts.append(int(x[0, 0]))
        offset = min(starts)
        assert sorted(starts) == [offset + 16 * i for i in range(epoch)] and offset < 16
        offsets.add(offset)
    assert len(offsets) > 1 or size < 33


def test_the_batch_size_only_cuts_the_order():
    small, large = Batches(IDS, 16, 2, 0), Batches(IDS, 16, 6, 0)
    assert np.array_equal(
        np.concatenate([small[t][0] for t in range(30)]), np.concatenate([large[t][0] for t in range(10)])
    )


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match=r"20 tokens, too few .* 16") as error:
        Batches(IDS[:20], 16, 2, 0)
    one_sentence(error)

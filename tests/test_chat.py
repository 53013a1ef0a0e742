"""A conversation with a model that has little context: what is forgotten, and that it goes on."""

import json

import pytest

from tritkit import chat
from tritkit.engine.sampling import Sampling

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture
def folder(make_folder):
    folder = make_folder("b158")  # a context of 128 tokens
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return folder


def talk(folder, monkeypatch, lines: list[str], system: str | None = None, max_tokens: int = 8) -> list[list[dict]]:
    """The conversations that the template was given for these lines."""
    seen, said = [], iter([*lines, ""])
    render = chat.render

    def spy(tokenizer, messages):
        seen.append([dict(m) for m in messages])
        return render(tokenizer, messages)

    monkeypatch.setattr(chat, "render", spy)
    monkeypatch.setattr("builtins.input", lambda prompt="": next(said))
    assert chat.converse(folder, "native", 1, None, None, system, max_tokens, Sampling(seed=0)) == 0
    return seen


@pytest.mark.parametrize("system", [None, "the owls sang"])
def test_a_long_conversation_forgets_its_oldest_turns(folder, monkeypatch, system):
    lines = [f"the cat saw the moon {i} times" for i in range(10)]
    seen = talk(folder, monkeypatch, lines, system)
    last = seen[-1]
    assert [m["role"] for m in last if m["role"] == "system"] == ([] if system is None else ["system"])
    turns = [m for m in last if m["role"] != "system"]
    assert turns[-1] == {"role": "user", "content": lines[-1]}
    assert [m["role"] for m in turns] == ["user", "assistant"] * (len(turns) // 2) + ["user"]
    users = [m["content"] for m in turns if m["role"] == "user"]
    assert 1 < len(users) < 10 and users == lines[-len(users) :]


def test_nothing_is_forgotten_while_there_is_room(folder, monkeypatch):
    seen = talk(folder, monkeypatch, ["the cat", "the moon"])
    assert [m["content"] for m in seen[-1] if m["role"] == "user"] == ["the cat", "the moon"]


def test_the_answer_has_room(folder, monkeypatch):
    """Forgetting begins before the prompt fills the context: half of it at most is kept for the answer."""
    lines = ["the cat sat on a mat"] * 8
    short, long = (talk(folder, monkeypatch, lines, max_tokens=n)[-1] for n in (2, 100))
    assert len(long) < len(short)


def test_a_single_message_beyond_the_context_is_a_mistake(folder, monkeypatch):
    with pytest.raises(ValueError, match="context is 128"):
        talk(folder, monkeypatch, ["the cat " * 200])

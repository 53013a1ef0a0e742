"""Settings: what is dumped loads to the same tree, and a wrong setting is named with the nearest right one."""

from dataclasses import dataclass, field, replace

import pytest

from tritkit import config


@dataclass(frozen=True)
class Inner:
    rate: float = 1e-3
    name: str = "plain"
    limit: int | None = None
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tree:
    steps: int = 10
    on: bool = False
    inner: Inner = field(default_factory=Inner)


def load(tmp_path, text="", **overrides):
    path = tmp_path / "a.toml"
    path.write_text(text, encoding="utf-8")
    return config.load(Tree, path, {k.replace("__", "."): v for k, v in overrides.items()})


STRINGS = ["", "a b", 'quo"ted', "back\\slash", "new\nline\ttab\rreturn", "é 🌙", "\x01\x7f\x1f", "# [x] = ,", "'"]


@pytest.mark.parametrize("name", STRINGS)
def test_strings_round_trip(tmp_path, name):
    tree = Tree(inner=Inner(name=name, files=(name, "b")))
    path = tmp_path / "a.toml"
    path.write_text(config.dump(tree), encoding="utf-8", newline="")
    assert config.load(Tree, path) == tree


@pytest.mark.parametrize(
    "tree",
    [Tree(), Tree(-3, True), Tree(inner=Inner(1e-30, "x", 7, ("a", "b,c"))), Tree(inner=Inner(1e300)),
     Tree(10**18, inner=Inner(0.1 + 0.2)), Tree(inner=Inner(float("inf")))],
)  # fmt: skip
def test_round_trip(tmp_path, tree):
    path = tmp_path / "a.toml"
    path.write_text(config.dump(tree), encoding="utf-8")
    assert config.load(Tree, path) == tree
    assert config.dump(config.load(Tree, path)) == config.dump(tree)


def test_settings_of_training_round_trip(tmp_path):
    from tritkit.trainer import Settings

    s = Settings()
    trees = [
        s,
        replace(s, model=replace(s.model, weights="ternary", activations="a8", tie_word_embeddings=False)),
        replace(s, data=replace(s.data, sources=("a b/*.txt", 'c".jsonl'), tokenizer="t", val=("v",), val_share=0.1)),
        replace(
            s, train=replace(s.train, init="x\\y", compile=True), optim=replace(s.optim, schedule="linear", lr=3e-5)
        ),
    ]
    for tree in trees:
        (tmp_path / "a.toml").write_text(config.dump(tree), encoding="utf-8")
        assert config.load(Settings, tmp_path / "a.toml") == tree


def test_files_and_overrides(tmp_path):
    text = 'steps = 3\n[inner]\nrate = 1\nfiles = ["a", "b"]\n'
    assert load(tmp_path, text) == Tree(3, inner=Inner(1.0, files=("a", "b")))
    tree = load(
        tmp_path, text, steps="7", on="True", inner__rate="2e-4", inner__limit="5", inner__name="3", inner__files="x,y"
    )
    assert tree == Tree(7, True, Inner(2e-4, "3", 5, ("x", "y")))
    assert load(tmp_path, "[inner]\nlimit = 4\n", inner__limit="none").inner.limit is None
    assert config.load(Tree) == Tree()


WRONG = [
    ("stepps = 3", {}, "no setting 'stepps'; did you mean 'steps'"),
    ("[inner]\nrat = 3", {}, "no setting 'inner.rat'; did you mean 'inner.rate'"),
    ("zzz = 3", {}, "no setting 'zzz'; known are steps, on, inner.rate"),
    ("", {"inner.nam": "x"}, "did you mean 'inner.name'"),
    ("", {"iner.name": "x"}, "'iner'"),
    ('steps = "three"', {}, "'steps' wants int, not 'three'"),
    ("steps = 3.5", {}, "'steps' wants int, not '3.5'"),
    ("steps = true", {}, "'steps' wants int, not 'True'"),
    ("on = 1", {}, "'on' wants bool, not '1'"),
    ("", {"on": "yes"}, "'on' wants bool, not 'yes'"),
    ("", {"steps": "1e3"}, "'steps' wants int, not '1e3'"),
    ("", {"inner.rate": "fast"}, "'inner.rate' wants float, not 'fast'"),
    ("[inner]\nname = 3", {}, "'inner.name' wants str, not '3'"),
    ('[inner]\nfiles = "a"', {}, "'inner.files' wants .*, not 'a'"),
    ("[inner]\nfiles = [1]", {}, "'inner.files' wants"),
    ("inner = 3", {}, "'inner' is a table of settings, not the value 3"),
    ("", {"inner": "3"}, "'inner' is a table of settings"),
    ("[steps]\nx = 3", {}, "'steps' wants int"),
    ("steps = 3", {"steps.x": "3"}, "'steps' is a value, not a table"),
    ("steps = = 3", {}, "not a TOML file"),
]


@pytest.mark.parametrize(("text", "overrides", "message"), WRONG)
def test_what_is_wrong_is_named(tmp_path, text, overrides, message):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        config.load(Tree, tmp_path / "a.toml", overrides)


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(ValueError, match=r"no settings file .*nowhere\.toml"):
        config.load(Tree, tmp_path / "nowhere.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"b\.toml is not a TOML file"):
        config.load(Tree, tmp_path / "b.toml")


def test_names():
    assert config.names(Tree) == ["steps", "on", "inner.rate", "inner.name", "inner.limit", "inner.files"]


def test_every_settings_file_of_the_project_loads():
    from pathlib import Path

    from tritkit.trainer import load_settings

    files = [*(Path(__file__).parent.parent / "configs").glob("*.toml"), None]
    assert len(files) > 1 and all(load_settings(file, {}).model.vocab_size for file in files)

"""A sweep's rows are what quantize and eval give by themselves; it goes on where it was, and refuses before it runs."""

import json
import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from tritkit.checkpoint import open_folder
from tritkit.cli import main
from tritkit.engine.codes import NotNative
from tritkit.engine.load import load
from tritkit.evals import divergence
from tritkit.evals.perplexity import evaluate, held_out_text
from tritkit.methods.quantizer import quantize_folder
from tritkit.methods.recipe import LoadedRecipe, Recipe, read_recipe
from tritkit.models.shapes import linear_names, linear_shape
from tritkit.sweeps import estimate as estimate_module
from tritkit.sweeps import run as module
from tritkit.sweeps.estimate import Estimate, Probe, said
from tritkit.sweeps.kinds import kind_of
from tritkit.sweeps.run import sweep
from tritkit.sweeps.settings import Settings
from tritkit.sweeps.table import COLUMNS, markdown, write_markdown

SIZES = {"intermediate_size": 128, "initializer_range": 0.05}
RECIPES = {
    "rtn4": 'format = "int4_g32"\n',
    "gptq3": 'format = "int3_g32"\nmethod = "gptq"\n',
    "misfit": 'format = "int4_g48"\n',  # no multiple of 64
}


@pytest.fixture
def place(make_folder, text_file, tmp_path):
    """A model, recipes and a calibration text; settings with two chunks and one window of 128 tokens."""
    model = make_folder("llama", **SIZES)
    for name, text in RECIPES.items():
        (tmp_path / f"{name}.toml").write_text(text)
    calibration = tmp_path / "calibration.txt"
    calibration.write_text("owls sang and the cat saw the moon while a hill sat on rain. " * 60)
    data = tmp_path / text_file.name  # a copy: tests may change it
    data.write_bytes(text_file.read_bytes())
    settings = Settings(
        str(model),
        data=(str(data),),
        chunks=2,
        windows=1,
        calibration=(str(calibration),),
        sequences=4,
        length=64,
        engine="torch",
    )
    recipes = {name: read_recipe(tmp_path / f"{name}.toml") for name in RECIPES}
    return namedtuple("Place", "folder settings recipes out")(tmp_path, settings, recipes, tmp_path / "sweep.json")


def counted(monkeypatch):
    """The names of the recipes that are quantised from now on."""
    made = []

    def quantize(model, out, loaded, *arguments, **options):
        made.append(loaded.recipe.name)
        return quantize_folder(model, out, loaded, *arguments, **options)

    monkeypatch.setattr(module, "quantize_folder", quantize)
    return made


def change_weights(folder):
    """The last byte of them, and nothing about their file."""
    path = Path(folder) / "model.safetensors"
    data, times = bytearray(path.read_bytes()), path.stat().st_mtime_ns
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times, times))


def shapes(folder):
    return [linear_shape(folder.config, name) for name in linear_names(folder.config)]


def rows(path):
    return {row["name"]: row for row in json.loads(path.read_text())["rows"]}


def test_rows_are_what_the_verbs_give(place, text_file, tmp_path):
    s = place.settings
    sweep(s, list(place.recipes.values()), place.out, keep=True)
    found = rows(place.out)
    assert list(found) == ["llama-0", "rtn4", "gptq3", "misfit"]
    base = found["llama-0"]["metrics"]
    assert base["divergence_kl"] == 0 and base["divergence_top1"] == 1 and base["bits_per_weight"] == 32
    assert found["misfit"]["error"].startswith("int4_g48 has groups of 48 columns, but a row of")
    assert found["misfit"]["metrics"] == {} and found["rtn4"]["error"] is None
    quantize_folder(s.model, tmp_path / "own", place.recipes["gptq3"], s.calibration, sequences=4, length=64)
    model, parent = load(tmp_path / "own", "torch"), load(s.model, "torch")
    wanted = evaluate(model, [str(text_file)], protocol="gptq", limit=127)
    wanted |= divergence.evaluate(model, [str(text_file)], parent=parent, protocol="llama.cpp", limit=2 * 63)
    metrics = found["gptq3"]["metrics"]
    for name, value in wanted.items():
        if name not in ("eval_tokens_per_second", "divergence_parent"):
            assert metrics[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name
    assert metrics["divergence_tokens"] == 126 and metrics["gptq_tokens"] == 127
    assert metrics["types"].startswith("14 int3_g32") and 3 < metrics["bits_per_weight"] < 5
    assert metrics["quantize_seconds"] > 0 and found["gptq3"]["method"] == "gptq"
    kept = [p.name for p in (tmp_path / "sweep.work").iterdir()]
    assert {k.rsplit("-", 1)[0] for k in kept} == {"rtn4", "gptq3"}  # and no logits


def test_it_goes_on_where_it_was(place, monkeypatch):
    made = []

    def quantize(model, out, loaded, *arguments, **options):
        made.append(loaded.recipe.name)
        if len(made) == 2:
            raise KeyboardInterrupt
        return quantize_folder(model, out, loaded, *arguments, **options)

    monkeypatch.setattr(module, "quantize_folder", quantize)
    first, second = place.recipes["rtn4"], place.recipes["gptq3"]
    with pytest.raises(KeyboardInterrupt):
        sweep(place.settings, [first, second], place.out)
    assert list(rows(place.out)) == ["llama-0", "rtn4"]
    before = rows(place.out)["rtn4"]
    sweep(place.settings, [second, first], place.out)
    assert made == ["rtn4", "gptq3", "gptq3"]
    assert list(rows(place.out)) == ["llama-0", "gptq3", "rtn4"] and rows(place.out)["rtn4"] == before
    assert not place.out.with_suffix(".work").exists()
    sweep(place.settings, [first, second], place.out, exact=["rtn4"])  # nothing is left to do
    assert len(made) == 3 and rows(place.out)["rtn4"]["exact"] and not rows(place.out)["gptq3"]["exact"]


def test_a_failed_row_is_tried_again(place, monkeypatch):
    def broken(*_, **__):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(module, "quantize_folder", broken)
        sweep(place.settings, [place.recipes["rtn4"]], place.out)
    assert rows(place.out)["rtn4"]["error"] == "MemoryError: no room"
    work = place.out.with_suffix(".work")
    assert not work.exists()
    work.mkdir()
    (work / "notes.txt").write_text("mine")
    sweep(place.settings, [place.recipes["rtn4"]], place.out)
    assert rows(place.out)["rtn4"]["error"] is None
    assert [p.name for p in work.iterdir()] == ["notes.txt"]


def test_a_folder_that_was_quantised_before_the_stop_is_used(place, monkeypatch):
    (place.folder / "budget.toml").write_text('budget.bits = 4.0\nbudget.options = ["int3_g32", "int4_g32"]\n')
    loaded = read_recipe(place.folder / "budget.toml")  # its linears have formats only when it is measured
    sweep(place.settings, [], place.out)
    made = counted(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(module, "score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sweep(place.settings, [loaded], place.out)
    assert list(rows(place.out)) == ["llama-0"] and made == ["budget"]
    sweep(place.settings, [loaded], place.out)
    assert rows(place.out)["budget"]["error"] is None and made == ["budget"]
    assert rows(place.out)["budget"]["metrics"]["recipe_digest"] == loaded.digest()


def test_a_kept_folder_made_otherwise_is_made_again(place, monkeypatch):
    recipes, made = [place.recipes["rtn4"], place.recipes["gptq3"]], counted(monkeypatch)

    def again(settings):
        place.out.unlink(missing_ok=True)
        made.clear()
        sweep(settings, recipes, place.out, keep=True)
        return made

    assert again(place.settings) == ["rtn4", "gptq3"] and again(place.settings) == []
    fewer = replace(place.settings, sequences=2)
    assert again(fewer) == ["gptq3"] and again(replace(fewer, length=32)) == ["gptq3"]  # rtn4 sees no text
    text = Path(place.settings.calibration[0])
    text.write_text(text.read_text().replace("moon", "noon"))
    assert again(replace(fewer, length=32)) == ["gptq3"]
    change_weights(place.settings.model)
    assert again(replace(fewer, length=32)) == ["rtn4", "gptq3"]


def test_without_room_for_logits_the_parent_runs_again(place, monkeypatch):
    sweep(place.settings, [place.recipes["rtn4"]], place.out)
    usage = namedtuple("usage", "free")(1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(module, "keep_logits", None)
    other = place.out.with_name("other.json")
    sweep(place.settings, [place.recipes["rtn4"]], other)
    kl = [rows(path)["rtn4"]["metrics"]["divergence_kl"] for path in (place.out, other)]
    assert kl[0] == pytest.approx(kl[1], rel=1e-6) and kl[0] > 0


def test_books_are_the_calibration_where_none_is_named(place):
    settings = Settings(**{**vars(place.settings), "calibration": ()})
    tree = sweep(settings, [place.recipes["rtn4"], place.recipes["gptq3"]], place.out)
    assert [row.get("calibrated") for row in tree["rows"]] == [False, False, True]
    assert "4 x 64 tokens of the bundled books" in markdown(tree)


def test_other_settings_are_another_sweep(place):
    sweep(place.settings, [], place.out)
    before = place.out.read_bytes()
    for change, words in (({"chunks": 3}, "have --chunks 2, not 3"), ({"suites": ("perplexity",)}, "have --suites")):
        changed = Settings(**{**vars(place.settings), **change})
        with pytest.raises(ValueError, match=words):
            sweep(changed, [], place.out)
    assert place.out.read_bytes() == before
    place.out.write_text('{"schema": 1, "runs": []}')
    with pytest.raises(ValueError, match="is no file of a sweep"):
        sweep(place.settings, [], place.out)
    assert place.out.read_text() == '{"schema": 1, "runs": []}'


def test_rows_of_files_that_have_changed_are_refused(place):
    settings = replace(place.settings, suites=("perplexity",))
    data = Path(settings.data[0])
    sweep(settings, [], place.out)
    before = place.out.read_bytes()
    for path in (data, *Path(settings.model).iterdir()):
        os.utime(path, (0, 0))
    sweep(settings, [], place.out)  # the same bytes
    tree = json.loads(before)
    del tree["digests"]
    place.out.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="do not say what their model and texts held; give another --out"):
        sweep(settings, [], place.out)
    place.out.write_bytes(before)
    for name, change in {
        "MODEL has": lambda: change_weights(settings.model),
        "the text of --data has": lambda: data.write_text(data.read_text().replace("e", "a")),
        "the text of --calibration has": lambda: Path(settings.calibration[0]).write_text("rain " * 500),
    }.items():
        place.out.unlink()
        sweep(settings, [], place.out)
        before = place.out.read_bytes()
        change()
        with pytest.raises(ValueError, match=f"{name} changed since the rows of .* were measured; give another --out"):
            sweep(settings, [], place.out)
        assert place.out.read_bytes() == before


def test_torch_runs_what_the_native_engine_refuses_and_nothing_else(place):
    settings = replace(place.settings, engine="native", kv_bits=8, suites=("perplexity",))
    with pytest.raises(ValueError, match="kv_bits is 5"):
        replace(settings, kv_bits=5).open(settings.model, 1)
    with pytest.raises(ValueError, match="head is 'flaot'"):
        replace(settings, head="flaot").open(settings.model, 1)
    (place.folder / "llm8.toml").write_text('format = "int8_row"\ninputs = "int8_row+outliers"\n')
    tree = sweep(settings, [place.recipes["rtn4"], read_recipe(place.folder / "llm8.toml")], place.out, threads=1)
    had = [tuple(row["metrics"][f"eval_{name}"] for name in ("engine", "kv_bits", "head")) for row in tree["rows"]]
    assert had == [("native", 8, "float"), ("native", 8, "float"), ("torch", 32, "float")]
    text = markdown(tree)
    assert "* Rows are run by the native engine: keys and values of 8 bits, head float.\n" in text
    assert ("* llm8, which the native engine refuses, is run by the torch engine: keys and values of 32 bits, head "
            "float.\n") in text  # fmt: skip
    assert "run natively on activations rounded to int8 in groups of 32 (a8_g32), as in llama.cpp.\n" in text


@pytest.mark.parametrize("format", ["int4_g8", "a4", "int8_g32_asym", "int8_row+outliers"])
def test_what_only_torch_runs_is_refused_as_that(place, format):
    recipe = Recipe(format=format) if format == "int4_g8" else Recipe(format="int8_row", inputs=format)
    quantize_folder(place.settings.model, place.folder / "made", recipe)
    with pytest.raises(NotNative, match="torch"):
        load(place.folder / "made", "native", 1)


REFUSED = {
    "suite": (["--suites", "perplexity,divergense"], "no suite 'divergense'; did you mean 'divergence'?"),
    "no suite": (["--suites", ","], "--suites is empty"),
    "recipe": (["nofile.toml"], "nofile.toml"),
    "short": (["--data", "{short}"], "shorter than one window"),
    "short calibration": (["{gptq3}", "--calibration", "{short}"], "the calibration text has"),
    "same text": (["--data", "{text}", "--calibration", "{text}"], "is both calibration and test"),
    "out": (["--out", "sweep.txt"], "expected a name that ends in .json"),
    "nowhere": (["--out", "nowhere/sweep.json"], "there is no folder"),
    "twice": (["{rtn4}", "{rtn4}"], "two recipes are named 'rtn4'"),
    "exact": (["{rtn4}", "--exact", "rtn5"], "--exact rtn5 is none of the recipes: rtn4"),
    "chunks": (["--chunks", "-1"], "--chunks is -1"),
    "markdown": (["--markdown", "{short}"], "has no place for the table"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_anything_runs(place, text_file, capsys, case):
    arguments, words = REFUSED[case]
    (place.folder / "short.txt").write_text("the cat")
    names = {"text": text_file, "short": place.folder / "short.txt"}
    names |= {name: place.folder / f"{name}.toml" for name in RECIPES}
    given = ["sweep", place.settings.model, *(a.format(**names) for a in arguments), "--engine", "torch"]
    given += [] if "--out" in arguments else ["--out", str(place.out)]
    given += [] if "--data" in arguments else ["--data", str(text_file)]
    before = sorted(p.name for p in place.folder.iterdir())
    assert main(given) == 2
    assert words in capsys.readouterr().err
    assert sorted(p.name for p in place.folder.iterdir()) == before


def test_the_verb_prints_and_writes_the_table(place, text_file, capsys, monkeypatch):
    monkeypatch.setattr(module, "decode_rate", lambda *_: (321.0, 2.0))  # many seconds for each row
    document = place.folder / "doc.md"
    document.write_text("# Title\n\n<!-- sweep -->\nold\n<!-- /sweep -->\nbehind\n")
    recipes = [str(place.folder / f"{name}.toml") for name in ("rtn4", "misfit")]
    options = ["--data", str(text_file), "--chunks", "1", "--windows", "1", "--suites", "perplexity,divergence,speed"]
    options += ["--exact", "rtn4", "--out", str(place.out), "--markdown", str(document), "--threads", "1"]
    assert main(["sweep", place.settings.model, *recipes, *options]) == 1
    shown = capsys.readouterr()
    assert "tritkit: 1 of 3 rows failed: misfit" in shown.err
    assert "3 rows to do, about" in shown.err and "2/3 rtn4: perplexity" in shown.err and "left" in shown.err
    assert "rtn4 †" in shown.out and "misfit failed: int4_g48 has groups of 48" in shown.out
    text = document.read_text()
    assert text.startswith("# Title\n\n<!-- sweep -->\n| recipe | matrices |") and text.endswith("behind\n")
    assert "old" not in text and "exact by construction" in text
    metrics = rows(place.out)["rtn4"]["metrics"]
    assert f"± {metrics['llama_cpp_perplexity_error']:.3f} |" in text and "| 321 ± 2 |" in text
    assert text.count("Machine: ") == 1 and ", 1 thread.\n" in text
    tree = json.loads(place.out.read_text())
    write_markdown(tree, str(place.folder / "new.md"))
    assert markdown(tree) in (place.folder / "new.md").read_text()
    document.write_text(f"{text}<!-- sweep twin -->\n<!-- /sweep twin -->\n")
    write_markdown({**tree, "rows": tree["rows"][:1]}, f"{document}#twin")
    assert document.read_text().startswith(text) and document.read_text().count("rtn4") == text.count("rtn4")
    with pytest.raises(ValueError, match="a line <!-- sweep other --> and"):
        write_markdown(tree, f"{document}#other")
    assert main(["sweep", place.settings.model, recipes[0], *options]) == 0, "the row of another call is not this one's"
    header, line, *body = markdown(tree).split("\n\n")[0].splitlines()
    assert {header.count("|"), line.count("|"), *(row.count("|") for row in body)} == {header.count("|")}


def test_rows_know_the_machine_they_were_measured_on(place):
    tree = sweep(place.settings, [place.recipes["rtn4"]], place.out, threads=1)
    assert all(row["machine"] == tree["machine"] and row["threads"] == 1 and row["version"] for row in tree["rows"])
    tree["rows"][1]["machine"] = {"cpu": "Abacus", "cores": 10}
    text = markdown(tree)
    assert "* Machine of rtn4: Abacus, 10 cores, 1 thread.\n" in text and "* Machine of llama-0: " in text


def test_an_edited_recipe_is_another_row_that_can_be_told_apart(place):
    file = place.folder / "edited.toml"
    for text in ('format = "int3_g32"\n', 'format = "int3_g32"\nrange = "mse"\n'):
        file.write_text(text)
        tree = sweep(place.settings, [read_recipe(file)], place.out)
    digests = [row["digest"][:8] for row in tree["rows"] if row["name"] == "edited"]
    assert len(set(digests)) == 2 and all(f"| edited ({d}) |" in markdown(tree) for d in digests)
    assert f"| {tree['rows'][0]['name']} |" in markdown(tree), "the only one of its name"


def test_the_layers_that_kept_a_term_are_counted(place):
    tree = sweep(place.settings, [place.recipes["rtn4"]], place.out)
    tree["rows"][1] |= {"recipe": 'correct = "qwt"'}
    tree["rows"][1]["metrics"]["adapters"] = 0
    assert "| rtn + qwt (0 layers) |" in markdown(tree)


def test_why_llama_cpp_has_no_number(place):
    tree = sweep(place.settings, [place.recipes["rtn4"]], place.out)
    assert "llama.cpp itself" not in markdown(tree)
    tree["rows"][0]["metrics"] |= {"peer_perplexity": 5.0}
    tree["rows"][1]["metrics"] |= {"peer_refusal": "GGUF has no type for it"}
    assert "* llama.cpp itself has numbers of the rows whose weights," in markdown(tree)
    tree["rows"][1]["metrics"] |= {"peer_error": "llama.cpp ended with code 6"}
    assert "* llama.cpp failed on rtn4: llama.cpp ended with code 6.\n" in markdown(tree)


def test_a_calibration_text_that_holds_the_test_is_refused(place, text_file):
    """Under another name, in the middle of other text, cut otherwise."""
    whole = text_file.read_text(encoding="utf-8")
    copy = place.folder / "copy.txt"
    copy.write_text("owls sang and the cat saw the moon. " * 3 + whole)
    settings = replace(place.settings, calibration=(str(copy),), sequences=64)
    with pytest.raises(
        ValueError, match=r"passages of 50 tokens of the calibration text copy.txt are in the test text"
    ):
        sweep(settings, [place.recipes["gptq3"]], place.out)
    assert not place.out.exists()
    sweep(settings, [place.recipes["rtn4"]], place.out)  # which reads none
    with pytest.raises(ValueError, match="is both calibration and test"):
        Settings(place.settings.model, calibration=(str(held_out_text()),))  # the test where none is named


def test_a_sequence_that_only_judges_a_correction_must_be_unseen_too(place, text_file):
    """QwT holds one of five sequences out, here the one in the middle, which the four of other methods leave out."""
    middle = text_file.read_text(encoding="utf-8")[:400]
    around = "owls sang and the cat saw the moon. " * 40
    (place.folder / "copy.txt").write_text(around + middle + around)
    (place.folder / "qwt.toml").write_text('format = "int3_g32"\ncorrect = "qwt"\n')
    settings = replace(place.settings, calibration=(str(place.folder / "copy.txt"),))
    sweep(settings, [place.recipes["gptq3"]], place.out)
    with pytest.raises(ValueError, match=r"of the calibration text copy.txt are in the test text"):
        sweep(settings, [read_recipe(place.folder / "qwt.toml")], place.out)
    assert "qwt" not in rows(place.out)


def test_small_numbers_have_digits_enough():
    def cell(value, error):
        return COLUMNS["KL to the parent, nats"]({"metrics": {"divergence_kl": value, "divergence_kl_error": error}})

    assert cell(0.0, 0.0) == "0.0000" and cell(0.49291, 0.0273) == "0.4929 ± 0.0273"
    assert cell(0.000179312, 3.1e-6) == "0.000179 ± 0.000003"
    assert cell(7592384.14, 431240.8) == "7,592,384 ± 431,241"


def test_the_suite_speed_is_bench(make_folder):
    folder = make_folder("llama", **SIZES)
    rate, sd = module.decode_rate(folder, open_folder(folder).config, "native", 1, {"kv_bits": 8, "head": None})
    assert rate > 10 and sd >= 0


def test_calibration_is_predicted_for_recipes_that_use_it(place):
    folder = load(place.settings.model, "torch").folder
    estimate = Estimate(folder, place.settings, Probe(1e-3, 1e-9, 1e-8), 10.0)
    without = replace(estimate, settings=replace(place.settings, calibration=()))
    rtn, gptq = place.recipes["rtn4"], place.recipes["gptq3"]
    assert kind_of(None) == "none" and kind_of(rtn) == "rtn" and kind_of(gptq) == "gptq"
    assert estimate.quantising(None) == 0 < estimate.quantising(rtn) < estimate.quantising(gptq)
    assert estimate.quantising(place.recipes["misfit"]) == 0
    longer = replace(estimate, settings=replace(place.settings, length=128))
    assert longer.quantising(rtn) == estimate.quantising(rtn) and longer.quantising(gptq) > estimate.quantising(gptq)
    search = LoadedRecipe(Recipe("q4_0", "q4_0"))  # weighs columns where there is text to weigh them by
    passes = 2 * 4 * 64 * sum(rows * columns for rows, columns in shapes(folder)) * 1e-9
    assert estimate.quantising(search) - without.quantising(search) == pytest.approx(passes)
    assert without.quantising(gptq) == estimate.quantising(gptq)  # the bundled books
    assert estimate.left([None, rtn]) == pytest.approx(estimate.quantising(rtn) + 20)
    assert [said(s) for s in (5, 600, 9000)] == ["5 s", "10 min", "2.5 h"]


def test_rows_of_a_busy_hour_do_not_spoil_the_estimate(place):
    """Seconds of rows that were really measured: the first three while others used the machine."""
    folder = load(place.settings.model, "torch").folder
    rtn, gptq = place.recipes["rtn4"], place.recipes["gptq3"]
    qwt = LoadedRecipe(replace(gptq.recipe, name="qwt", correct="qwt"))
    weights = sum(rows * columns for rows, columns in shapes(folder))
    each = Estimate(folder, place.settings, Probe(0, 1.0, 0), 0.0).quantising(gptq)
    estimate = Estimate(folder, place.settings, Probe(1e-3, 245 / each, 5 / weights), 60.0)
    todo, true = [*[qwt] * 10, *[rtn] * 10], 10 * (500 + 45) + 10 * (5 + 45)
    assert true / 2 < estimate.left(todo) < 2 * true
    for loaded, quantising, whole in ((None, 0, 316), (rtn, 29, 112), (gptq, 404, 451), (rtn, 6, 50), (gptq, 256, 290)):
        metrics = {"quantize_seconds": quantising} if loaded else {}
        estimate.learn_row(loaded, {"metrics": metrics, "seconds": whole, "error": None})
        assert true / 2 < estimate.left(todo) < 2 * true, (loaded, estimate.left(todo))
    estimate.learn_row(rtn, {"metrics": {}, "seconds": 1e6, "error": "it failed"})
    assert estimate.left([]) == 0 and estimate.left(todo) < 2 * true
    for _ in range(5):  # rows of the very kind say it best, and the latest ones
        estimate.learn(qwt, 700, 30)
    assert estimate.left([qwt]) == pytest.approx(700 + 30)


def test_a_peer_needs_perplexities(place):
    with pytest.raises(ValueError, match=r"--peer .* compares perplexities"):
        replace(place.settings, suites=("speed",), peer="llama.cpp")


def test_the_calibration_that_was_used_is_named(place):
    """Not what was asked for, where the context is shorter."""
    settings = replace(place.settings, length=4096)
    tree = sweep(settings, [place.recipes["gptq3"]], place.out)
    used = tree["rows"][1]["metrics"]["calibration_length"]
    assert used == open_folder(settings.model).config.max_position_embeddings < 4096
    assert f"{used} tokens of" in markdown(tree) and "4096" not in markdown(tree)


def test_rows_without_data_say_nothing_of_calibration(place):
    """Rounding is all overhead on a small model: hundreds of times what is predicted, which the forward passes of
    the same method with static inputs are not."""
    folder = load(place.settings.model, "torch").folder
    rtn, gptq = place.recipes["rtn4"], place.recipes["gptq3"]
    static = LoadedRecipe(replace(rtn.recipe, name="static", inputs="int8_tensor"))
    assert kind_of(static) == kind_of(rtn)
    estimate = Estimate(folder, place.settings, Probe(1e-3, 1e-9, 1e-11), 0.0)
    estimate.learn(rtn, 300 * estimate.quantising(rtn), 0.0)
    assert estimate.left([static]) == pytest.approx(estimate.quantising(static))
    estimate.learn(gptq, 2 * estimate.quantising(gptq), 0.0)
    assert estimate.left([static]) < 2.1 * estimate.quantising(static)


def test_a_stall_is_no_rate(monkeypatch):
    clock = iter([0, 9, 10, 11, 20, 27, 30, 31])  # one that does not count, then 1, 7, 1
    monkeypatch.setattr(estimate_module.time, "perf_counter", lambda: next(clock))
    assert estimate_module._seconds(lambda: None, 3) == 1


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_llama_cpps_perplexity_stands_beside_ours(place):
    pytest.importorskip("llama_cpp")
    settings = Settings(**{**vars(place.settings), "peer": "llama.cpp"})
    sweep(settings, [place.recipes["rtn4"]], place.out)
    base, other = rows(place.out)["llama-0"]["metrics"], rows(place.out)["rtn4"]["metrics"]
    assert base["peer_perplexity"] == pytest.approx(base["llama_cpp_perplexity"], rel=1e-3)
    assert "GGUF has no type for" in other["peer_refusal"]

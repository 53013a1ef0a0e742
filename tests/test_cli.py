"""The verbs as a user types them: what they print, and one sentence with exit code 2 for every mistake."""

import json
import re

import pytest

from tritkit.cli import VERBS, main
from tritkit.pack import pack


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def fails(capsys, *arguments: str) -> str:
    """The one sentence of a mistake: exit code 2, one line on standard error, no traceback."""
    code, _, error = run(capsys, *arguments)
    assert code == 2, error
    lines = [line for line in error.splitlines() if line.startswith("tritkit: ")]
    assert len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"example:\n  tritkit {verb}" in text


def test_overview_names_every_verb(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(re.search(rf"^  {verb} ", out, re.M) for verb in VERBS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generat"], ["'generat'", "'generate'"]),
        (["qqq"], ["'qqq'", "train"]),
        (["generate", "--temprature", "1"], ["--temprature"]),
        (["generate", "nowhere"], ["nowhere"]),
        (["eval", "nowhere"], ["nowhere"]),
        (["compare", "nowhere"], ["nowhere"]),
        (["generate", "--top-p", "2"], ["top_p", "2"]),
        (["generate", "--max-tokens", "many"], ["max-tokens", "many"]),
        (["train", "OUT"], ["--data"]),
        (["train", "nofile.toml", "OUT", "--data", "x.txt"], ["nofile.toml"]),
        (["train", "OUT", "--data", "missing.txt"], ["missing.txt"]),
        (["train", "OUT", "--data", "x.txt", "--train.setps=5"], ["'train.setps'", "'train.steps'"]),
        (["train", "OUT", "--data", "x.txt", "--train.steps=five"], ["'train.steps'", "int", "'five'"]),
        (["train", "OUT", "--data", "x.txt", "--model.family=lama"], ["'lama'", "llama"]),
        (["train", "OUT", "--data", "x.txt", "--model.weights=trinary", "--model.activations=a8"], ["'trinary'"]),
        (["train", "OUT", "--data", "x.txt", "--overwite"], ["--overwite", "--overwrite"]),
    ],
)
def test_mistakes_get_one_sentence(arguments, words, capsys, tmp_path, monkeypatch, text_file):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text(text_file.read_text(encoding="utf-8"), encoding="utf-8")
    sentence = fails(capsys, *arguments)
    assert all(word in sentence for word in words), sentence


def test_settings_of_a_recipe_are_options(capsys, make_folder, tmp_path):
    folder = str(make_folder("llama"))
    quantize = ["quantize", folder, str(tmp_path / "q")]
    assert "'--importanc=false'; did you mean --importance=?" in fails(capsys, *quantize, "q8_0", "--importanc=false")
    code, _, error = run(capsys, *quantize, "q8_0", "--importance=false", "--outlier-threshold=5")
    text = (tmp_path / "q" / "tritkit.toml").read_text()
    assert code == 0 and "importance = false" in text and "outlier_threshold = 5" in text
    assert "nothing is recorded of inputs and outputs" in error


def test_a_budget_is_spent_by_gptq(capsys, make_folder, tmp_path, text_file):
    folder = str(make_folder("llama"))
    options = ["--bits", "5", "--budget.options=int4_g32,int6_g32", "--calibration", str(text_file)]
    options += ["--sequences", "2", "--length", "64"]
    for name, more, method in (("a", [], "gptq"), ("b", ["--method", "rtn"], "rtn")):
        code, _, error = run(capsys, "quantize", folder, str(tmp_path / name), *options, *more)
        assert code == 0 and "nothing is recorded" not in error
        assert f'method = "{method}"' in (tmp_path / name / "tritkit.toml").read_text()


def test_text_that_is_none(capsys, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "zeros.txt").write_bytes(b"text\0text" * 10)
    for name, word in (("empty", "empty"), ("binary", "UTF-8"), ("zeros", "zero bytes")):
        sentence = fails(capsys, "train", str(tmp_path / "out"), "--data", str(tmp_path / f"{name}.txt"))
        assert f"{name}.txt" in sentence and word in sentence, sentence


def test_folder_that_is_no_model(capsys, tmp_path):
    assert "config.json" in fails(capsys, "inspect", str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "not JSON" in fails(capsys, "inspect", str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert "'gpt2'" in fails(capsys, "inspect", str(tmp_path))


def test_tokenizer_that_does_not_fit(capsys, make_folder):
    folder = make_folder("b158")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary.update({f"extra{i}": len(vocabulary) + i for i in range(50)})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    sentence = fails(capsys, "generate", str(folder), "--prompt", "the")
    assert "320" in sentence and "do not belong together" in sentence


def test_shape_that_cannot_be_packed(capsys, make_folder, tmp_path):
    folder = make_folder("b1", intermediate_size=162)
    sentence = fails(capsys, "pack", str(folder), str(tmp_path / "packed"))
    assert "162" in sentence and "down_proj" in sentence and "eight columns" in sentence
    assert not (tmp_path / "packed").exists()


def test_pack_refuses_what_is_not_latent(capsys, make_folder, tmp_path):
    assert "full-precision" in fails(capsys, "pack", str(make_folder("llama")), str(tmp_path / "a"))
    pack(make_folder("b158"), tmp_path / "packed")
    assert "packed already" in fails(capsys, "pack", str(tmp_path / "packed"), str(tmp_path / "b"))
    assert "--overwrite" in fails(capsys, "pack", str(make_folder("b158", 1)), str(tmp_path / "packed"))
    config = make_folder("b1", 2) / "config.json"
    config.write_text(config.read_text().replace('"binary"', '"int4_g32"'))
    assert "int4_g32 cannot be packed yet" in fails(capsys, "pack", str(config.parent), str(tmp_path / "c"))


def test_prompt_longer_than_the_context(capsys, make_folder):
    sentence = fails(capsys, "generate", str(make_folder("b158")), "--prompt", "the cat " * 200)
    assert "context is 128" in sentence
    assert "context is 128" in fails(capsys, "eval", str(make_folder("b158", 1)), "--context", "500")


def test_chat_without_a_template_offers_generate(capsys, make_folder):
    sentence = fails(capsys, "chat", str(make_folder("b158")))
    assert "no chat template" in sentence and "tritkit generate" in sentence


def test_chat_with_a_template(capsys, make_folder, monkeypatch):
    folder = make_folder("b158")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    lines = iter(["hello", "and the cat?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    code, out, _ = run(capsys, "chat", str(folder), "--max-tokens", "5", "--seed", "1")
    assert code == 0 and out.count("\n") >= 2


def test_generate_prints_prompt_and_continuation(capsys, make_folder):
    folder = str(make_folder("b158"))
    arguments = ["generate", folder, "--prompt", "the cat", "--max-tokens", "12", "--seed", "7"]
    code, out, error = run(capsys, *arguments)
    assert code == 0 and out.startswith("the cat") and "native engine" in error
    assert run(capsys, *arguments)[1] == out
    assert run(capsys, *arguments, "--engine", "torch", "--temperature", "0")[0] == 0
    stop = out[len("the cat") :][3:5]
    stopped = run(capsys, *arguments, "--stop", stop)[1]
    assert stop not in stopped[len("the cat") :] and out.startswith(stopped.rstrip("\n"))


def test_the_verbs_in_a_row(capsys, tmp_path, text_file):
    """train, pack, eval by three protocols, bench, compare, inspect: on a user's own text, results added up."""
    latent, packed = str(tmp_path / "m"), str(tmp_path / "m-packed")
    sizes = ["--model.hidden_size=64", "--model.intermediate_size=128", "--model.num_hidden_layers=1"]
    more = ["--model.vocab_size=300", "--model.max_position_embeddings=64", "--train.sequence_length=64"]
    formats = ["--model.weights=ternary", "--model.activations=a8", "--train.steps=6", "--train.batch_size=4"]
    assert run(capsys, "train", latent, "--data", str(text_file), *sizes, *more, *formats)[0] == 0
    assert run(capsys, "pack", latent, packed)[0] == 0
    for protocol in ("document", "llama.cpp", "gptq"):
        arguments = ["eval", packed, "--data", str(text_file), "--protocol", protocol, "--context", "32"]
        assert run(capsys, *arguments, "--limit", "200")[0] == 0
    assert run(capsys, "bench", packed, "--prompt", "8", "--tokens", "8", "--repeat", "2")[0] == 0
    code, out, _ = run(capsys, "compare", latent, packed, "--json")
    columns = json.loads(out)
    assert code == 0 and columns[packed]["weights"] == "ternary"
    for name in ("val_loss", "document_perplexity", "llama_cpp_perplexity", "gptq_perplexity", "native_decode_rate"):
        assert columns[packed][name] > 0
    assert 2.0 <= columns[packed]["bits_per_weight"] < 2.1
    assert run(capsys, "compare", latent, packed)[0] == 0
    code, out, _ = run(capsys, "inspect", packed, "--linears", "--json")
    found = json.loads(out)
    facts = found["facts"]
    assert code == 0 and facts["layout"] == "hf_autobitlinear" and len(found["per_linear"]) == 7
    assert facts["share_-1"] + facts["share_0"] + facts["share_+1"] == pytest.approx(1)
    assert "already holds a trained model" in fails(
        capsys, "train", latent, "--data", str(text_file), *sizes, *more, *formats
    )

"""Imports and exports touch nothing until what they wrote is good, and leave nothing where it is not."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tritkit.checkpoint import open_folder
from tritkit.cli import main
from tritkit.gguf_export import export_gguf
from tritkit.gguf_model import open_gguf
from tritkit.hf_export import export_hf
from tritkit.importer import import_model
from tritkit.tensorfile import StoredTensor, TensorFile, write_tensors


def spoiled(folder, name="model.layers.1.mlp.up_proj.weight"):
    """The folder with one value that is not a number."""
    file = folder / "model.safetensors"
    tensors = {n: StoredTensor(t.dtype, t.array.copy()) for n, t in TensorFile(file).items()}
    tensors[name].array[3, 5] = np.nan
    write_tensors(file, tensors, {})
    return folder


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_numbers_that_are_none_stop_every_export(make_folder, tmp_path):
    folder = open_folder(spoiled(make_folder("llama")))
    before = names(tmp_path)
    message = r"model.layers.1.mlp.up_proj.weight has 1 values that are not finite"
    for kind in ("f32", "f16", "q8_0"):
        with pytest.raises(ValueError, match=message):
            export_gguf(folder, tmp_path / "x.gguf", kind)
    for to in ("bf16", "float32"):
        with pytest.raises(ValueError, match=message):
            export_hf(folder, tmp_path / "out", to)
    with pytest.raises(ValueError, match=message):
        import_model(folder.path, tmp_path / "out")
    assert names(tmp_path) == before


def test_inspect_names_what_is_not_finite(make_folder, capsys):
    folder = spoiled(make_folder("llama"))
    assert main(["inspect", str(folder), "--json"]) == 0
    odd = json.loads(capsys.readouterr().out)["odd"]
    assert any("up_proj.weight has 1 values that are not finite" in line for line in odd)


@pytest.mark.parametrize("eps", [9.999999747378752e-06, 1.234567890123e-06])
def test_numbers_of_more_digits_than_a_float32_go_out(make_folder, tmp_path, eps):
    folder = make_folder("llama")
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | {"rms_norm_eps": eps}))
    export_gguf(open_folder(folder), tmp_path / "x.gguf")
    assert np.float32(open_gguf(tmp_path / "x.gguf").config.rms_norm_eps) == np.float32(eps)


def test_a_file_has_no_results_but_is_evaluated(make_folder, text_file, tmp_path, capsys):
    export_gguf(open_folder(make_folder("llama")), tmp_path / "x.gguf")
    assert main(["eval", str(tmp_path / "x.gguf"), "--data", str(text_file), "--limit", "50"]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main(["bench", str(tmp_path / "x.gguf"), "--prompt", "4", "--tokens", "4", "--repeat", "1", "--json"]) == 0


def test_no_export_replaces_what_it_reads(make_folder, tmp_path):
    folder = make_folder("llama")
    export_gguf(open_folder(folder), tmp_path / "x.gguf")
    before = (tmp_path / "x.gguf").read_bytes()
    with pytest.raises(ValueError, match="is the model itself; give another name"):
        export_gguf(open_gguf(tmp_path / "x.gguf"), tmp_path / "x.gguf", "f16", overwrite=True)
    assert (tmp_path / "x.gguf").read_bytes() == before
    with pytest.raises(ValueError, match="is the model itself; give another folder"):
        import_model(folder, folder, overwrite=True)


def test_an_import_replaces_a_model_whole_or_not_at_all(make_folder, tmp_path):
    first, second, out = make_folder("llama"), make_folder("llama", seed=1), tmp_path / "out"
    (first / "chat_template.jinja").write_text("{{ messages }}")
    import_model(first, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="already holds a model"):
        import_model(second, out)
    with pytest.raises(ValueError, match="not finite"):
        import_model(spoiled(make_folder("llama", seed=2)), out, overwrite=True)
    assert (out / "chat_template.jinja").exists()  # still the first
    import_model(second, out, overwrite=True)
    assert not (out / "chat_template.jinja").exists()
    assert (out / "notes.txt").read_text() == "mine"
    assert open_folder(out).tensors["model.norm.weight"].array.tobytes() == (
        open_folder(second).tensors["model.norm.weight"].array.tobytes()
    )
    assert not list(tmp_path.glob(".*"))


def test_a_folder_with_weights_but_no_config_is_not_replaced_either(make_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match="already holds a model"):
        import_model(make_folder("llama"), out)
    with pytest.raises(ValueError, match="has no name"):
        import_model(make_folder("llama"), "")
    assert (out / "model.safetensors").read_bytes() == b"mine"


def test_a_local_file_that_is_not_there_is_not_looked_for_in_the_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert main(["import", "models/missing.gguf", "out"]) == 2
    assert "there is no file or folder models/missing.gguf" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGTERM to catch")
def test_a_request_to_end_leaves_nothing(make_folder, tmp_path):
    """SIGTERM in the middle of the writing: the tensors are made slow so that there is a middle."""
    folder, out = make_folder("llama"), tmp_path / "out"
    program = (
        "import sys, time, tritkit.importer as i\n"
        "right = i.require_finite\n"
        "def slow(*a):\n    time.sleep(0.2)\n    right(*a)\n"
        "i.require_finite = slow\n"
        f"i.import_model({str(folder)!r}, {str(out)!r})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    for _ in range(300):
        if list(tmp_path.glob(".out.*")):
            break
        time.sleep(0.05)
    assert list(tmp_path.glob(".out.*"))
    os.kill(process.pid, signal.SIGTERM)
    process.wait(30)
    assert process.returncode != 0
    assert not list(tmp_path.glob(".out.*")) and not out.exists()


MEANINGLESS = {
    "revision": ("import", "--revision", "main"),
    "token": ("import", "--token", "hf_x"),
    "tokenizer": ("import", "--tokenizer", "tok512.bin"),
    "i2-s in": ("import", "--i2-s", "arm"),
    "i2-s out": ("export", "--i2-s", "arm"),
    "i2-s folder": ("export", "--i2-s", "arm", "--to", "bf16"),
}


@pytest.mark.parametrize("case", MEANINGLESS)
@pytest.mark.parametrize("container", ["folder", "file"])
def test_an_option_that_means_nothing_here_is_refused(make_folder, tmp_path, capsys, case, container):
    verb, option, *rest = MEANINGLESS[case]
    source, out = make_folder("llama"), tmp_path / ("out" if verb == "import" or len(rest) > 1 else "out.gguf")
    if container == "file":
        export_gguf(open_folder(source), tmp_path / "x.gguf")
        source = tmp_path / "x.gguf"
    assert main([verb, str(source), str(out), option, *rest]) == 2
    assert f"tritkit: {option}" in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()

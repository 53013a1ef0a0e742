"""Import by id, from a small hub of our own on this machine: what is asked, what is kept, and every way to fail."""

import json
import os
import subprocess
import sys

import pytest
from hub_server import Repo, serving
from huggingface_hub import constants

import tritkit
from tritkit.importer import import_model

NAME = "someone/tiny-model"
TEMPLATE = "/{repo_id}/resolve/{revision}/{filename}"
TOKEN = "hf_" + "a" * 34


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


@pytest.fixture
def tiny(hub, make_folder):
    """A repository with a small llama and what else real ones have."""
    repo = Repo(make_folder("llama"))
    repo.files |= {"LICENSE": b"Do as you like.\n", "README.md": b"# tiny\n", "pytorch_model.bin": b"\x80\x02pickle"}
    repo.files["original/consolidated.safetensors"] = b"not for us"
    hub.repos[NAME] = repo
    return repo


def refused(*arguments, **settings) -> str:
    """The one sentence, in which nothing was written to OUT."""
    with pytest.raises((ValueError, OSError)) as error:
        import_model(*arguments, **settings)
    sentence = str(error.value)
    assert "\n" not in sentence and not os.path.exists(arguments[1]), sentence
    return sentence


def shards(repo, count: int = 3) -> None:
    """The weights of a repository in several files with an index."""
    from safetensors.torch import load, save

    tensors = load(repo.files.pop("model.safetensors"))
    index = {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = dict(list(tensors.items())[i::count])
        repo.files[file] = save(part, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    repo.files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": index}).encode()


def test_a_whole_model(hub, tiny, tmp_path):
    out = tmp_path / "out"
    metrics = import_model(NAME, out)
    assert metrics["family"] == "llama"
    assert (out / "LICENSE").read_bytes() == tiny.files["LICENSE"]
    model = tritkit.load(out)
    assert tritkit.generate("the cat", model, max_tokens=4)
    asked = {r.split("/")[-1] for r in hub.downloads()}
    assert "pytorch_model.bin" not in asked and "consolidated.safetensors" not in asked and "README.md" not in asked


def test_the_second_time_nothing_is_downloaded(hub, tiny, tmp_path):
    import_model(NAME, tmp_path / "a")
    hub.requests.clear()
    import_model(NAME, tmp_path / "b")
    assert not hub.downloads() and hub.requests
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_shards_and_a_commit(hub, tiny, tmp_path):
    shards(tiny)
    import_model(NAME, tmp_path / "out", revision=tiny.commit)
    assert tritkit.load(tmp_path / "out")


def test_offline(hub, tiny, tmp_path, monkeypatch):
    import_model(NAME, tmp_path / "a")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    import_model(NAME, tmp_path / "b")
    assert not hub.requests
    sentence = refused("someone/else", tmp_path / "c")
    assert "HF_HUB_OFFLINE" in sentence and "someone/else" in sentence


def test_offline_without_the_weights(hub, tiny, tmp_path, monkeypatch):
    import_model(NAME, tmp_path / "a")
    for path in (tmp_path / "cache").rglob("model.safetensors"):
        path.unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "model.safetensors" in refused(NAME, tmp_path / "b")


def test_a_hub_that_does_not_answer(hub, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in refused(NAME, tmp_path / "a")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    import_model(NAME, tmp_path / "a")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    import_model(NAME, tmp_path / "b")  # the cache will do
    assert "from the cache" in capsys.readouterr().err


def test_a_hub_with_trouble(hub, tiny, tmp_path):
    hub.status = 503
    assert "status 503" in refused(NAME, tmp_path / "out")
    hub.status = 403
    assert "status 403" in refused(NAME, tmp_path / "out")


@pytest.mark.parametrize("cut", [1000, 100_000])
def test_a_connection_that_breaks_is_resumed(hub, tiny, tmp_path, monkeypatch, cut):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # 10 MB by itself: what is kept of a broken connection
    hub.cut_after = cut
    import_model(NAME, tmp_path / "out")
    assert [r for r in hub.downloads() if r.endswith(f"bytes={cut}-")], hub.downloads()
    assert tritkit.load(tmp_path / "out")


def test_damage_is_noticed_and_healed(hub, tiny, tmp_path):
    hub.damage = True
    sentence = refused(NAME, tmp_path / "out")
    assert "model.safetensors" in sentence and "damaged" in sentence and tiny.checksum("model.safetensors") in sentence
    hub.damage = False
    import_model(NAME, tmp_path / "out")
    assert tritkit.load(tmp_path / "out")


def test_damage_in_the_cache_is_noticed_offline(hub, tiny, tmp_path, monkeypatch):
    import_model(NAME, tmp_path / "a")
    (weights,) = (tmp_path / "cache").rglob("model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.resolve().write_bytes(data)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "damaged" in refused(NAME, tmp_path / "b")


def test_revisions_and_names_that_are_none(hub, tiny, tmp_path):
    assert "no revision v9" in refused(NAME, tmp_path / "out", revision="v9")
    assert "no model someone/nothing" in refused("someone/nothing", tmp_path / "out")
    assert "no name" in refused("some--one/x..y", tmp_path / "out")


@pytest.mark.parametrize("gated", [False, True])
def test_tokens(hub, tiny, tmp_path, gated):
    tiny.token, tiny.gated = TOKEN, gated
    for wrong in (None, "hf_" + "b" * 34):
        sentence = refused(NAME, tmp_path / "out", token=wrong)
        assert "--token" in sentence and ("gated" if gated else "private") in sentence
        assert "hf_" not in sentence
    import_model(NAME, tmp_path / "out", token=TOKEN)


def test_pickles_alone_are_refused_before_the_download(hub, tiny, tmp_path):
    del tiny.files["model.safetensors"]
    sentence = refused(NAME, tmp_path / "out")
    assert "pytorch_model.bin" in sentence and "pickle" in sentence and not hub.downloads()


def test_what_tritkit_cannot_run_is_refused_before_its_weights(hub, tiny, tmp_path):
    config = json.loads(tiny.files["config.json"])
    tiny.files["config.json"] = json.dumps({**config, "model_type": "mamba"}).encode()
    assert "'mamba'" in refused(NAME, tmp_path / "out")
    tiny.files["config.json"] = json.dumps(config).encode()
    tiny.commit = tiny.commit[::-1]
    del tiny.files["tokenizer.json"]
    assert "tokenizer.json" in refused(NAME, tmp_path / "out")
    assert not any("model.safetensors" in r for r in hub.downloads())


def test_too_large_for_the_disk(hub, tiny, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(OSError, match="GB left"):
        import_model(NAME, tmp_path / "out")
    assert not any("model.safetensors" in r for r in hub.downloads())


def test_gguf_files(hub, tiny, tmp_path):
    hub.repos["someone/tiny-gguf"] = repo = Repo()
    repo.files = {"README.md": b"", "sub/tiny-q8_0.gguf": b"GGUF" + bytes(40), "tiny-f16.gguf": b"GGUF"}
    sentence = refused("someone/tiny-gguf", tmp_path / "out")
    assert "tritkit import someone/tiny-gguf/sub/tiny-q8_0.gguf OUT" in sentence and "tiny-f16.gguf" in sentence
    assert "tiny-f16.gguf" in refused("someone/tiny-gguf/other.gguf", tmp_path / "out")
    assert not hub.downloads()
    assert "tiny-q8_0.gguf" in refused("someone/tiny-gguf/sub/tiny-q8_0.gguf", tmp_path / "out")  # it is no model
    assert [r.split("/")[-1] for r in hub.downloads()] == ["tiny-q8_0.gguf"]


def test_the_command(hub, tiny, tmp_path):
    """In a process of its own, as a user types it: environment variables and standard error."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
    }
    command = [sys.executable, "-m", "tritkit", "import", NAME, str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    hub.requests.clear()
    again = [*command[:-1], str(tmp_path / "again")]
    done = subprocess.run(again, env={**environment, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and not hub.requests, done.stderr
    done = subprocess.run([*command, "--revision", "no"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr

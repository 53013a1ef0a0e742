"""What training does to the folder it writes into: nothing of value is lost, and two runs never share it."""

import dataclasses

import pytest

from tritkit import results
from tritkit.checkpoint import open_folder
from tritkit.models.config import ModelConfig
from tritkit.optim import OptimConfig
from tritkit.trainer import DataConfig, LossNotFinite, Settings, TrainConfig, TrainingStopped, load_settings, train
from tritkit.trainstate import TrainState


@pytest.fixture
def settings(text_file):
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    return Settings(
        ModelConfig(weights="ternary", activations="a8", max_position_embeddings=32, **sizes),
        DataConfig(sources=(str(text_file),)),
        OptimConfig(warmup_steps=2),
        TrainConfig(steps=4, batch_size=2, sequence_length=32, threads=1),
    )


def interrupted(settings, out, after: int):
    """Train until the step ``after``, where Ctrl-C comes."""
    calls = []

    def loss(model, x, y):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return model.loss(x, y)

    with pytest.raises(TrainingStopped):
        train(settings, out, loss=loss)


def test_a_mistake_with_overwrite_leaves_the_finished_model(settings, tmp_path):
    out = tmp_path / "m"
    train(settings, out)
    before = (out / "model.safetensors").read_bytes()
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "little.txt").write_text("too little")
    wrong = [
        dataclasses.replace(settings, data=DataConfig(sources=(str(tmp_path / "binary.txt"),))),
        dataclasses.replace(settings, data=DataConfig(sources=(str(tmp_path / "little.txt"),))),
        dataclasses.replace(settings, model=dataclasses.replace(settings.model, weights="trinary")),
        dataclasses.replace(settings, train=dataclasses.replace(settings.train, device="cud")),
    ]
    for each in wrong:
        with pytest.raises(ValueError):
            train(each, out, overwrite=True)
        assert open_folder(out).config.weights == "ternary"
        assert (out / "model.safetensors").read_bytes() == before


def test_a_new_model_does_not_inherit_results(settings, tmp_path):
    out = tmp_path / "m"
    train(settings, out)
    results.record(out, "eval", {}, {"document_perplexity": 1.0})
    train(settings, out, overwrite=True)
    assert "document_perplexity" not in results.latest(out)
    assert "document_perplexity" in (out / "results.previous.json").read_text()


def test_files_that_are_not_ours_stay(settings, tmp_path):
    (tmp_path / ".mine.tmp").write_text("mine")
    train(settings, tmp_path)
    assert (tmp_path / ".mine.tmp").read_text() == "mine"


def test_two_runs_never_share_a_folder(settings, tmp_path):
    first = TrainState(tmp_path / "m" / "training")
    first.claim("", overwrite=False)
    with pytest.raises(ValueError, match="another run is training"):
        train(settings, tmp_path / "m")
    first.close()
    train(settings, tmp_path / "m")


def test_other_text_is_refused(settings, tmp_path, text_file):
    text = tmp_path / "mine.txt"
    text.write_bytes(text_file.read_bytes())
    settings = dataclasses.replace(settings, data=DataConfig(sources=(str(text),)))
    interrupted(settings, tmp_path / "m", after=2)
    text.write_bytes(text_file.read_bytes() + b"One more line of text.\n" * 300)
    with pytest.raises(ValueError, match="begun on other text"):
        train(settings, tmp_path / "m")
    text.write_bytes(text_file.read_bytes())  # as it was, though newer
    train(settings, tmp_path / "m")


def test_its_toml_makes_the_folder_again(settings, tmp_path):
    train(settings, tmp_path / "a")
    again = load_settings(tmp_path / "a" / "tritkit.toml")
    assert again == settings
    train(again, tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_its_results_say_what_it_is(settings, tmp_path):
    train(settings, tmp_path / "m")
    metrics = results.latest(tmp_path / "m")
    assert metrics["family"] == "bitnet" and metrics["bits_per_weight"] == 32
    assert metrics["file_bytes"] == (tmp_path / "m" / "model.safetensors").stat().st_size


def test_a_loss_that_is_no_number_is_a_value_error(settings, tmp_path):
    with pytest.raises(ValueError, match=r"not a number .* nothing was lost: start again"):
        train(settings, tmp_path / "m", loss=lambda model, x, y: model.loss(x, y) * float("nan"))
    assert issubclass(LossNotFinite, TrainingStopped)


@pytest.mark.parametrize(
    "override",
    [
        "optim.clip=-1",
        "optim.warmup_steps=-5",
        "optim.lr_2=-1",
        "optim.beta_1=1",
        "train.micro_batch=-1",
        "train.threads=-1",
    ],
)
def test_settings_out_of_range_are_named(override):
    name, _, value = override.partition("=")
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_settings(None, {name: value})

"""A run of `tritkit quantize` that is stopped and goes on ends with the very bytes of one that was not."""

import pytest
from float_folder import LONG, SHORT, a_folder, a_text, recipe

from tritkit.methods import layerwise
from tritkit.methods.quantizer import quantize_folder

QWT = {"format": "int2_g32", "correct": "qwt", "qwt.check": "false", "qwt.ridge": "0.1"}
CASES = {
    "awq": {"format": "int3_g32", "transform": "awq", "method": "gptq"},
    "static inputs": {"format": "int8_row", "inputs": "int8_tensor_asym", "transform": "smoothquant"},
    "embedding": {"format": "q4_0", "embedding": "int8_row"},
    "ternary": {"format": "ternary", "method": "gptq", "inputs": "int8_row"},
    "qwt": QWT,
    "finetune": QWT | {"qwt.finetune": "1", "qwt.rate": "1e-3"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    return a_folder(folder / "model"), a_text(folder)


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_ends_as_if_it_had_not_been(place, tmp_path, case, monkeypatch):
    (source, text), corrects = place, "correct" in CASES[case]
    settings, size = recipe(**CASES[case]), LONG if corrects else SHORT
    layer, seen = layerwise.Layerwise._layer, []

    def stops(self, number, *rest):
        if number == 2 and not seen:
            seen.append(number)
            raise KeyboardInterrupt
        return layer(self, number, *rest)

    quantize_folder(source, tmp_path / "whole", settings, [text], **size)
    monkeypatch.setattr(layerwise.Layerwise, "_layer", stops)
    with pytest.raises(KeyboardInterrupt):
        quantize_folder(source, tmp_path / "again", settings, [text], **size)
    metrics = quantize_folder(source, tmp_path / "again", settings, [text], **size)
    assert seen and (metrics["adapters"] > 0) == corrects
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()

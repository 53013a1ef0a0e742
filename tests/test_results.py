"""results.json: runs are added and never lost, and a file that is not of the schema is refused."""

import json

import pytest

from tritkit import __version__, results


def test_runs_are_added(tmp_path):
    assert results.read(tmp_path) == [] and results.latest(tmp_path) == {}
    first = results.record(tmp_path, "train", {"steps": 3}, {"val_loss": 2.5, "family": "bitnet", "none": None})
    second = results.record(tmp_path, "eval", {}, {"val_loss": 2.0}, {"layer": {"share_0": 0.3}})
    assert results.read(tmp_path) == [first, second]
    assert results.latest(tmp_path) == {"val_loss": 2.0, "family": "bitnet"}
    tree = json.loads((tmp_path / "results.json").read_text())
    assert tree["schema"] == results.SCHEMA and tree["runs"][1]["per_linear"] == {"layer": {"share_0": 0.3}}
    assert first["version"] == __version__ and first["time"].endswith("+00:00")
    assert first["machine"]["cores"] >= 1 and first["machine"]["cpu"]
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_what_cannot_be_written_loses_nothing(tmp_path):
    results.record(tmp_path, "train", {}, {"val_loss": 1.0})
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(TypeError):
        results.record(tmp_path, "eval", {}, {"odd": object()})
    assert (tmp_path / "results.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


RUN = {"verb": "x", "time": "", "version": "", "machine": {}, "settings": {}, "metrics": {}, "per_linear": {}}
ODD = {
    "not JSON": "{",
    "schema 99": json.dumps({"schema": 99, "runs": []}),
    "schema None": "{}",
    "schema list": "[]",
    "has no runs": json.dumps({"schema": 1}),
    "no runs of type list": json.dumps({"schema": 1, "runs": {"a": 1}}),
    "run 0 has no verb": json.dumps({"schema": 1, "runs": [3]}),
    "run 1 has no metrics of type dict": json.dumps({"schema": 1, "runs": [RUN, {**RUN, "metrics": 3}]}),
}


@pytest.mark.parametrize("message", ODD)
def test_odd_files_are_refused_and_left_alone(tmp_path, message):
    path = tmp_path / "results.json"
    path.write_text(ODD[message])
    for act in (results.read, results.latest, lambda f: results.record(f, "eval", {}, {})):
        with pytest.raises(ValueError, match=message):
            act(tmp_path)
    assert path.read_text() == ODD[message]

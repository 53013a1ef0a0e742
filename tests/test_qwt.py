"""QwT's closed form against least squares of numpy, and what happens to it in a model."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tritkit import quantize
from tritkit.methods import qwt
from tritkit.methods.recipe import QwtOptions, Recipe, read_recipe


def pairs(tokens=400, features=16, outputs=12, seed=0, noise=0.1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=generator) + 3.0  # a mean that only the intercept can take
    w, b = torch.randn(outputs, features, generator=generator), torch.randn(outputs, generator=generator)
    y = x @ w.t() + b + noise * torch.randn(tokens, outputs, generator=generator)
    return x, y


def test_without_ridge_it_is_least_squares():
    x, y = pairs()
    term = qwt.solve([(x[:150], y[:150]), (x[150:], y[150:])], ridge=0.0)
    design = np.concatenate([x.double().numpy(), np.ones((len(x), 1))], axis=1)
    theta, *_ = np.linalg.lstsq(design, y.double().numpy(), rcond=None)
    assert np.abs(term.weight.double().numpy() - theta[:-1].T).max() < 2e-3  # float16 of values up to 3
    assert np.abs(term(x).numpy() - design @ theta).max() < 0.02


def test_ridge_is_the_closed_form_of_the_paper():
    """W = Y X^T (X X^T + lambda I)^-1 for centred X and Y (columns are samples), lambda relative to the mean square."""
    x, y = pairs(noise=1.0)
    term = qwt.solve([(x, y)], ridge=0.3)
    cx, cy = (t.double().numpy() - t.double().numpy().mean(0) for t in (x, y))
    strength = 0.3 * np.square(cx).mean(0).mean() * len(cx)
    wanted = cy.T @ cx @ np.linalg.inv(cx.T @ cx + strength * np.eye(cx.shape[1]))
    assert np.abs(term.weight.double().numpy() - wanted).max() < 2e-3


def test_fewer_tokens_than_channels_is_no_disaster():
    x, y = pairs(tokens=6)
    term = qwt.solve([(x, y)], ridge=1e-2)
    assert torch.isfinite(term.weight).all() and qwt.explained([(x, y)], term) > 0


def test_explained_is_one_minus_what_is_left():
    x, y = pairs(noise=0.0)
    term = qwt.solve([(x, y)], ridge=0.0)
    assert qwt.explained([(x, y)], term) > 0.9999
    nothing = qwt.Compensation(torch.zeros(12, 16, dtype=torch.float16), y.mean(0))
    assert abs(qwt.explained([(x, y)], nothing)) < 1e-5


class Block(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(features), nn.Linear(features, 2 * features)
        self.down = nn.Linear(2 * features, features)

    def forward(self, x, scale=1.0):
        return (x + scale * self.down(torch.nn.functional.gelu(self.up(self.norm(x)))),)


class Model(nn.Module):
    def __init__(self, features=32, depth=3):
        super().__init__()
        self.enter, self.head = nn.Linear(8, features), nn.Linear(features, 5)
        self.blocks = nn.ModuleList(Block(features) for _ in range(depth))

    def forward(self, x, scale=1.0):
        x = self.enter(x)
        for block in self.blocks:
            (x,) = block(x, scale=scale)
        return self.head(x)


def a_model(seed=0):
    torch.manual_seed(seed)
    return Model().eval(), [torch.randn(4, 24, 8) for _ in range(8)], torch.randn(8, 24, 8)


def error_after(**recipe):
    model, batches, test = a_model()
    with torch.no_grad():
        before = model(test)
        report = quantize(model, read_recipe(None, recipe), batches)
        return float((model(test) - before).norm() / before.norm()), report, model


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_it_takes_back_a_good_part_of_the_error(method):
    plain, _, _ = error_after(format="int3_row", method=method)
    compensated, report, model = error_after(format="int3_row", method=method, correct="qwt")
    assert compensated < 0.85 * plain
    assert all(0 < entry["r2_held_out"] <= 1 for entry in report["adapters"].values())
    kept = [name for name, entry in report["adapters"].items() if entry["kept"]]
    assert kept and all(hasattr(model.get_submodule(name), "adapter") for name in kept)
    assert report["adapter_bytes"] == sum(2 * 32 * 32 + 4 * 32 for _ in kept)


def ridge_of(x, missing, ridge):
    """W and b for rows x and what is missing, in float64: the closed form for centred columns."""
    x, missing = (
        np.concatenate([t.reshape(-1, t.shape[-1]) for t in all_]).astype(np.float64) for all_ in (x, missing)
    )
    cx, cy = x - x.mean(0), missing - missing.mean(0)
    gram = cx.T @ cx
    w = np.linalg.solve(gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram)), cx.T @ cy).T
    b = missing.mean(0) - w @ x.mean(0)
    left = missing - x @ w.T - b
    return w, b, 1 - np.square(left).sum() / np.square(cy).sum()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_terms_are_fitted_on_the_compensated_prefix(method):
    """x of each block is what the quantised and compensated blocks before it make; the target is what the float block
    makes of that very x, less what the quantised one does."""
    model, batches, _ = a_model()
    floats = copy.deepcopy(model)
    recipe = Recipe(format="int3_row", method=method, correct="qwt", qwt=QwtOptions(check=False, ridge=0.05))
    report = quantize(model, recipe, batches)["adapters"]
    with torch.no_grad():
        states = [model.enter(batch) for batch in batches]
        for name, number in (("blocks.0", 0), ("blocks.1", 1), ("blocks.2", 2)):
            block, before = model.blocks[number], floats.blocks[number]
            assert report[name]["kept"]
            after = [block(x)[0] for x in states]  # with the term
            missing = [before(x)[0] - (y - block.adapter(x)) for x, y in zip(states, after, strict=True)]
            rows = [[t.numpy() for t in values] for values in (states, missing)]
            w, b, r2 = ridge_of(rows[0][:7], rows[1][:7], 0.05)  # one of eight batches is held out
            stored = block.adapter.weight.double().numpy(), block.adapter.bias.double().numpy()
            assert np.abs(stored[0] - w).max() < 2e-3 * np.abs(w).max()
            assert np.abs(stored[1] - b).max() < 5e-3 * np.abs(b).max()
            assert report[name]["r2"] == pytest.approx(r2, abs=1e-3)
            x, y = rows[0][7].reshape(-1, 32), rows[1][7].reshape(-1, 32)
            held = 1 - np.square(y - x @ w.T - b).sum() / np.square(y - y.mean(0)).sum()
            assert report[name]["r2_held_out"] == pytest.approx(held, abs=5e-3)
            states = after


def test_a_term_that_explains_nothing_held_out_is_dropped():
    """14 rows for 32 channels: what is fitted is fitted wholly, and says nothing of others."""
    torch.manual_seed(1)
    model = Model().eval()
    batches = [torch.randn(1, 2, 8) for _ in range(8)]
    recipe = Recipe(format="int2_row", correct="qwt", qwt=QwtOptions(check=False, ridge=0.0))
    report = quantize(model, recipe, batches)
    dropped = [entry for entry in report["adapters"].values() if entry["r2_held_out"] <= 0]
    assert dropped and all(entry["r2"] > 0.8 and not entry["kept"] for entry in dropped)
    for name, entry in report["adapters"].items():
        assert entry["kept"] == (entry["r2_held_out"] > 0) == hasattr(model.get_submodule(name), "adapter")


def test_a_term_that_does_harm_is_left_out():
    """With a distance that only grows, no term may stay."""
    model, batches, _ = a_model()
    calls = iter(range(1, 1000))
    report = quantize(
        model, read_recipe(None, {"format": "int3_row", "correct": "qwt"}), batches,
        distance=lambda wanted, found: torch.tensor(float(next(calls))),
    )  # fmt: skip
    assert not any(entry["kept"] for entry in report["adapters"].values())
    assert report["adapter_bytes"] == 0 and not any(hasattr(block, "adapter") for block in model.blocks)


def test_bits_per_weight_count_the_terms():
    _, plain, _ = error_after(format="int4_row")
    _, compensated, _ = error_after(format="int4_row", correct="qwt")
    assert compensated["bits_per_weight"] > plain["bits_per_weight"]
    assert compensated["bytes"] - plain["bytes"] == compensated["adapter_bytes"]


def test_without_calibration_it_says_so():
    model, _, _ = a_model()
    with pytest.raises(ValueError, match="qwt needs calibration data"):
        quantize(model, read_recipe(None, {"format": "int3_row", "correct": "qwt"}))


@pytest.mark.parametrize("inputs", [{}, {"inputs": "int4_row"}])
def test_finetuning_the_terms_brings_the_outputs_nearer(inputs):
    settings = {"format": "int3_row", "correct": "qwt", **inputs}
    compensated, _, _ = error_after(**settings)
    tuned, report, model = error_after(**settings, **{"qwt.finetune": "4", "qwt.rate": "1e-3"})
    assert (
        report["finetune"]["kept"] and report["finetune"]["divergence_after"] < report["finetune"]["divergence_before"]
    )
    assert tuned < 0.985 * compensated
    assert all(b.adapter.weight.dtype == torch.float16 for b in model.blocks if hasattr(b, "adapter"))


def test_finetuning_that_does_harm_is_taken_back():
    settings = {"format": "int3_row", "correct": "qwt"}
    compensated, _, before = error_after(**settings)
    tuned, report, after = error_after(**settings, **{"qwt.finetune": "1", "qwt.rate": "10.0"})
    assert not report["finetune"]["kept"] and tuned == compensated
    assert all(
        torch.equal(a.adapter.weight, b.adapter.weight) for a, b in zip(before.blocks, after.blocks, strict=True)
    )

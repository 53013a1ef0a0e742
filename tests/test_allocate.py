"""Bits under a budget: the choice against brute force, the measure against the divergence itself."""

import itertools

import numpy as np
import pytest
import torch

from tritkit.methods.allocate import Option, choose, hull


def options(seed, linears=5, each=4):
    rng = np.random.default_rng(seed)
    found = {}
    for i in range(linears):
        sizes = np.cumsum(rng.integers(5, 20, each))
        costs = np.sort(rng.exponential(1.0, each) * rng.uniform(0.2, 5))[::-1]
        found[f"l{i}"] = [Option(f"f{j}", int(s), float(c)) for j, (s, c) in enumerate(zip(sizes, costs, strict=True))]
    return found


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_near_the_best_of_all(seed):
    """Greedy on the hull is optimal but for the last step, which may not fit: never worse than the best with the
    largest single step less to spend."""
    every = options(seed)
    step = max(b.bytes - a.bytes for points in map(hull, every.values()) for a, b in itertools.pairwise(points))
    smallest = sum(min(o.bytes for o in group) for group in every.values())
    for budget in (smallest, smallest + 15, smallest + 40, smallest + 90):
        chosen = choose(every, budget)
        assert sum(o.bytes for o in chosen.values()) <= budget

        def best(limit):
            combinations = itertools.product(*every.values())
            return min((sum(o.cost for o in c) for c in combinations if sum(o.bytes for o in c) <= limit), default=None)

        cost, bound = sum(o.cost for o in chosen.values()), best(budget - step)
        assert bound is None or cost <= bound + 1e-9
        assert cost >= best(budget) - 1e-9


def test_more_budget_never_costs_more():
    every = options(3)
    smallest = sum(min(o.bytes for o in group) for group in every.values())
    costs = [sum(o.cost for o in choose(every, smallest + more).values()) for more in range(0, 120, 10)]
    assert costs == sorted(costs, reverse=True) or max(np.diff(costs)) < 1e-9


def test_options_that_are_larger_and_worse_are_never_taken():
    points = hull([Option("a", 10, 5.0), Option("b", 20, 6.0), Option("c", 30, 1.0), Option("d", 25, 4.5)])
    assert [p.format for p in points] == ["a", "c"]


def test_a_budget_below_the_smallest_is_refused():
    with pytest.raises(ValueError, match="the budget of 3 bytes is less than"):
        choose(options(0), 3)


def test_the_measure_is_the_divergence_to_second_order(tmp_path):
    """For one linear at a time: what an option is said to add, and what it adds."""
    from float_folder import a_folder

    from tritkit.checkpoint import open_folder
    from tritkit.formats import format_of
    from tritkit.methods.allocate import measure
    from tritkit.methods.calibration import Calibration
    from tritkit.methods.recipe import read_recipe
    from tritkit.methods.stream import DecoderStream

    source = a_folder(tmp_path / "model", vocab_size=4096)
    model = open_folder(source)
    tokens = torch.randint(0, 4096, (8, 48), generator=torch.Generator().manual_seed(5))
    recipe = read_recipe(None, {"budget.bits": "4", "budget.options": "int4_g32,int6_g32"})
    found = measure(model, recipe, Calibration(tokens, tokens[:0]))
    stream = DecoderStream(model)
    said, added = [], []
    for name in list(found)[::4]:
        for option in found[name]:
            number = int(name.split(".")[2])
            with torch.no_grad():
                states = [stream.embed(tokens)]
                reference = [list(stream.log_probabilities(x)) for x in stream.finish(states, 0)]
                for i in range(number):
                    states = [stream.call(stream.layer(i), 0, states[0])]
                layer = stream.layer(number)
                module = layer.get_submodule(name.removeprefix(f"model.layers.{number}."))
                module.weight.data = format_of(option.format).quantize(module.weight).dequantize()
                changed = stream.finish([stream.call(layer, 0, states[0])], number + 1)
                added.append(stream.divergence(reference, changed))
            said.append(option.cost)
    ratio = np.log(np.array(said) / np.array(added))
    assert np.corrcoef(np.log(said), np.log(added))[0, 1] > 0.9
    assert abs(np.median(ratio)) < np.log(2)


def test_importance_from_a_file_weighs_the_options(tmp_path):
    from float_folder import a_folder

    from tritkit.checkpoint import open_folder
    from tritkit.methods.allocate import measure
    from tritkit.methods.calibration import Calibration
    from tritkit.methods.recipe import read_recipe
    from tritkit.models.shapes import matrix_shape

    model = open_folder(a_folder(tmp_path / "model", vocab_size=4096))
    tokens = torch.randint(0, 4096, (2, 48), generator=torch.Generator().manual_seed(5))
    recipe = read_recipe(None, {"budget.bits": "5", "budget.options": "q4_0,q5_0"})
    data = Calibration(tokens, tokens[:0])
    plain, name = measure(model, recipe, data), "model.layers.1.mlp.up_proj"
    columns = torch.ones(matrix_shape(model.config, name)[1])
    columns[:4] = 1e6
    weighed = measure(model, recipe, data, {name: columns})
    assert {n for n in plain if [o.cost for o in plain[n]] != [o.cost for o in weighed[n]]} == {name}


def test_gptq_is_measured_as_it_is_run(tmp_path, monkeypatch):
    """On inputs that the cost is not measured on, with first tokens, which count more; rounding needs none of it."""
    from float_folder import a_folder

    from tritkit.checkpoint import open_folder
    from tritkit.methods import METHODS
    from tritkit.methods.allocate import measure
    from tritkit.methods.calibration import Calibration
    from tritkit.methods.recipe import read_recipe

    model, seen = open_folder(a_folder(tmp_path / "model", vocab_size=4096)), []
    tokens = torch.randint(0, 4096, (9, 48), generator=torch.Generator().manual_seed(5))

    for method in ("gptq", "rtn"):
        solve = METHODS[method]

        def noted(w, plan, stats, options, solve=solve):
            seen.append(None if stats is None else (stats.tokens, sum(map(len, stats.first)), stats.paired))
            return solve(w, plan, stats, options)

        monkeypatch.setitem(METHODS, method, noted)
        recipe = read_recipe(None, {"budget.bits": "5", "budget.options": "int4_g32,int6_g32", "method": method})
        measure(model, recipe, Calibration(tokens, tokens[:0]))
        assert set(seen) == {(5 * 48, 5, True) if method == "gptq" else None}
        seen.clear()

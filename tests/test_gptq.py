"""GPTQ against the paper's own algorithm, written out: one column after the other, with the inverse Hessian updated."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tritkit.formats import Grid, format_of
from tritkit.layouts import LAYOUTS
from tritkit.methods import gptq, rtn
from tritkit.methods.recipe import GptqOptions, Plan, Recipe
from tritkit.methods.stats import InputStats


def inputs(tokens=512, features=64, seed=0, rank=None):
    """Correlated inputs: only then the order of events matters."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or features, features, generator=generator)
    return torch.randn(tokens, rank or features, generator=generator) @ mix / features**0.5


def stats_of(x):
    stats = InputStats(x.shape[1])
    stats.update(x)
    return stats


def weights(rows=24, columns=64, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def optimal_brain_quantizer(w, hessian, format, damping):
    """Frantar et al. 2022, equations 2 and 3 in the fixed order of section 3.2: quantise column q, move the others by
    -(w_q - quant(w_q)) / [H^-1]_qq * (H^-1)_{:,q}, and take q out of H^-1 by one step of Gaussian elimination."""
    w = w.double().clone()
    h = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    result = torch.zeros_like(w)
    for q in range(w.shape[1]):
        if q % format.group == 0:
            grid = format.fit(format.split(w[:, q : q + format.group].float()))
        code = format.encode(w[:, q, None, None].float(), grid)
        result[:, q] = format.decode(code, grid)[:, 0, 0].double()
        error = (w[:, q] - result[:, q]) / inverse[q, q]
        w -= torch.outer(error, inverse[q])
        inverse -= torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return result


@pytest.mark.parametrize("name", ["int4_g32", "int3_g16_asym", "int2_g64", "int8_g32"])
@pytest.mark.parametrize("columns", [16, 64])
def test_it_is_the_algorithm_of_the_paper(name, columns):
    format, x, w = format_of(name), inputs(), weights()
    stats = stats_of(x)
    q = gptq.solve(w, Plan(format, "gptq"), stats, Recipe(gptq=GptqOptions(columns=columns, act_order=False)))
    wanted = optimal_brain_quantizer(w, stats.hessian / stats.tokens, format, 0.01)
    # a value on the edge of two codes may fall either way, and moves all later columns: a few rows at most
    rows = (q.dequantize().double() - wanted).abs().amax(1) < 1e-3
    assert rows.float().mean() > 0.9


def on_given_grids(w, hessian, format, grid, order, damping):
    """The same where the grids are there beforehand, the columns taken in an order."""
    w, h = w.double().clone(), hessian.double().clone()
    dead = h.diagonal() == 0
    h[dead, dead] = h.diagonal()[~dead].mean()
    w[:, dead] = 0
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    inverse, result = torch.linalg.inv(h), torch.zeros_like(w)
    split = format.split(torch.arange(w.shape[1]).repeat(len(w), 1).float())  # which columns are a group
    for q in order:
        group = int((split[0] == q).any(-1).float().argmax()) if split.shape[1] > 1 else 0
        some = slice(group, group + 1)
        own = Grid(
            *(None if t is None else t[:, some] for t in (grid.scale, grid.inverse, grid.offset, grid.threshold))
        )
        code = format.encode(w[:, q, None, None].float(), own)
        result[:, q] = format.decode(code, own)[:, 0, 0].double()
        w -= torch.outer((w[:, q] - result[:, q]) / inverse[q, q], inverse[q])
        inverse -= torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return result


@pytest.mark.parametrize("name", ["int4_g32", "int3_row", "int4_tensor", "int3_g16_asym", "nf4", "q4_0"])
@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_columns_of_large_inputs_first_is_the_algorithm_on_their_order(name, damping):
    """The default: grids of the untouched weights, columns by the diagonal of the Hessian; with a massive channel and
    a dead one."""
    format, x, w = format_of(name), inputs(), weights()
    x[:, 9] *= 30
    x[:, 20] = 0
    stats = stats_of(x)
    plan = Plan(format, "gptq")
    q = gptq.solve(w, plan, stats, Recipe(gptq=GptqOptions(damping=damping)))
    hessian = stats.hessian / stats.tokens
    grid = rtn.fit(format.split(w), format, plan, None if name != "q4_0" else stats.second_moment.reshape(
        format.split(w).shape[1:]))  # fmt: skip
    diagonal = hessian.diagonal().clone()
    diagonal[20] = diagonal[[i for i in range(64) if i != 20]].mean()
    order = torch.argsort(diagonal, descending=True, stable=True).tolist()
    wanted = on_given_grids(w, hessian, format, grid, order, damping)
    assert order[0] == 9
    rows = (q.dequantize().double() - wanted).abs().amax(1) < 1e-3
    assert rows.float().mean() > 0.9
    natural = on_given_grids(w, hessian, format, grid, range(64), damping)
    assert ((q.dequantize().double() - natural).abs().amax(1) < 1e-3).float().mean() < 0.5


NATURAL = GptqOptions(act_order=False)
FORMATS = ["int4_g32", "int4_row", "int4_tensor", "int3_g16_asym", "ternary", "binary", "nf4", "nf4_dq", "fp4_g32"]


@pytest.mark.parametrize("name", [*FORMATS, "q4_0", "q5_1", "q4_k", "q3_k", "q2_k", "q6_k"])
@pytest.mark.parametrize(
    "options", [GptqOptions(), GptqOptions(act_order=False), GptqOptions(act_order=False, static_groups=True)]
)
def test_the_output_is_nearer_than_with_rounding(name, options):
    format, columns = format_of(name), 256 if name.endswith("_k") else 64
    x, w = inputs(4 * columns, columns), weights(columns=columns)
    stats = stats_of(x)
    plan, recipe = Plan(format, "gptq"), Recipe(gptq=options)
    ours, rounded = gptq.solve(w, plan, stats, recipe), rtn.solve(w, plan, stats, recipe)
    errors = [float(((q.dequantize() - w) @ x.t()).square().mean()) for q in (ours, rounded)]
    assert errors[0] < 0.9 * errors[1]
    assert abs(stats.output_error(ours.dequantize() - w) / w.shape[0] - errors[0]) < 1e-4 * errors[0] + 1e-9
    assert ours.codes.min() >= format.lo and ours.codes.max() <= format.hi
    assert np.array_equal(LAYOUTS[format.layout].dequantize(rtn.packed(ours), w.shape), ours.dequantize().numpy())


def test_without_correlation_it_is_rounding():
    format, w = format_of("int4_g32"), weights()
    stats = InputStats(64)
    stats.tokens, stats.hessian = 1, torch.eye(64, dtype=torch.float64)
    plan = Plan(format, "gptq")
    assert torch.equal(gptq.solve(w, plan, stats, Recipe()).codes, rtn.solve(w, plan, stats, Recipe()).codes)


def test_lazy_batches_change_nothing():
    format, w, stats = format_of("int4_row"), weights(), stats_of(inputs())
    found = [
        gptq.solve(w, Plan(format, "gptq"), stats, Recipe(gptq=replace(NATURAL, columns=n))).dequantize()
        for n in (1, 7, 64)
    ]
    for other in found[1:]:
        assert ((found[0] - other).abs().amax(1) < 1e-5).float().mean() > 0.9  # sums in another order


def test_inputs_that_are_always_zero():
    x = inputs()
    x[:, 5] = 0
    q = gptq.solve(weights(), Plan(format_of("int4_row"), "gptq"), stats_of(x), Recipe())
    assert torch.isfinite(q.dequantize()).all() and (q.codes.reshape(24, 64)[:, 5] == 0).all()


@pytest.mark.parametrize("name", ["int3_row", "q4_k"])
def test_dead_inputs_do_not_make_the_scale_of_the_others_matter(name):
    """With half of the inputs always zero, the result is the same for inputs of any size."""
    format, x, w = format_of(name), inputs(512, 256), weights(columns=256)
    x[:, ::2] = 0
    found = [gptq.solve(w, Plan(format, "gptq"), stats_of(x * size), Recipe()).dequantize() for size in (1.0, 1e-3)]
    errors = [float(((q - w) @ x.t()).square().mean()) for q in found]
    assert abs(errors[0] / errors[1] - 1) < 0.02


def test_the_order_of_the_columns_matters_where_a_channel_is_massive():
    """Its weights are rounded first, so that all others make up for them (paper, section 3.3, act-order)."""
    format, x, w = format_of("int4_g32"), inputs(1024, 64), weights()
    x[:, 60] *= 50
    stats = stats_of(x)
    errors = [
        stats.output_error(
            gptq.solve(w, Plan(format, "gptq"), stats, Recipe(gptq=GptqOptions(act_order=order))).dequantize() - w
        )
        for order in (True, False)
    ]
    assert errors[0] < 0.8 * errors[1]


def test_a_singular_hessian_is_damped_and_said():
    x = inputs(tokens=8, rank=4)
    stats = stats_of(x)
    q = gptq.solve(weights(), Plan(format_of("int4_row"), "gptq"), stats, Recipe(gptq=GptqOptions(damping=0.0)))
    assert torch.isfinite(q.dequantize()).all()
    assert "singular" in stats.derived["note"] and "damping" in stats.derived["note"]


def test_the_first_token_of_a_sequence_counts_as_often_as_asked():
    """As if it stood there so many times."""
    x, w, plan = inputs(256, 64).reshape(4, 64, 64), weights(), Plan(format_of("int4_g32"), "gptq")
    once, often = InputStats(64), InputStats(64)
    once.update(x, x[:, 0])
    often.update(torch.cat([x.flatten(0, 1), *[x[:, 0]] * 31]))
    often.tokens = once.tokens  # a factor of the whole Hessian changes nothing but the size of the damping
    found = gptq.solve(w, plan, once, Recipe(gptq=GptqOptions(sink=32.0)))
    assert torch.equal(found.codes, gptq.solve(w, plan, often, Recipe()).codes)
    paper = gptq.solve(w, plan, once, Recipe(gptq=GptqOptions(sink=1.0)))
    at_first = [float(((q.dequantize() - w) @ x[:, 0].t()).square().sum()) for q in (found, paper)]
    assert at_first[0] < 0.7 * at_first[1]


def test_without_calibration_it_says_so():
    with pytest.raises(ValueError, match="gptq needs calibration data"):
        gptq.solve(weights(), Plan(format_of("int4_row"), "gptq"), None, Recipe())

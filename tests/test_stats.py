"""Statistics of inputs against what the module multiplies and what they are sums of."""

import pytest
import torch
from torch import nn

from tritkit.formats import format_of
from tritkit.methods.blocks import input_rows, matrix_of
from tritkit.methods.stats import SAMPLE, InputStats


def test_input_statistics_of_a_convolution_are_those_of_its_windows():
    """Equation of the layer-wise error: |D * x|^2 of the convolution itself is trace(D H D^T)."""
    conv, x = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False), torch.randn(2, 3, 9, 9)
    stats = InputStats(27)
    stats.update(input_rows(conv, x))
    with torch.no_grad():
        wanted = float(conv(x).square().sum()) / stats.tokens
    assert stats.output_error(conv.weight.detach().flatten(1)) == pytest.approx(wanted, rel=1e-4)


def test_statistics_see_every_row_and_sample_from_all_over():
    from tritkit.methods.ranges import RangeObserver

    stats, format = InputStats(4), format_of("int8_tensor")
    stats.observers["absmax"] = RangeObserver(format, ("absmax",))
    chunks = [torch.full((1000, 4), float(i)) for i in range(40)]
    chunks[33][617, 2] = -7e4  # beyond float16, and in a row that no sample has
    for chunk in chunks:
        stats.update(chunk)
    assert stats.observers["absmax"].ranges()["absmax"] == (-7e4, 7e4) and stats.largest.max() == 7e4
    rows = stats.rows()
    assert SAMPLE / 3 <= len(rows) <= SAMPLE and set(rows[:, 0].tolist()) == set(range(40))
    wanted = sum(c.double().t() @ c.double() for c in chunks)
    assert torch.allclose(stats.hessian, wanted, rtol=1e-5) and torch.equal(stats.squares, stats.hessian.diagonal())


def test_a_sample_has_no_more_first_tokens_than_there_are():
    """Sequences of 2048 tokens whose first is massive, as in a decoder: every so many rows would be all of these."""
    stats = InputStats(8)
    for seed in range(32):
        x = torch.randn(2048, 8, generator=torch.Generator().manual_seed(seed))
        x[0] = 1000.0
        stats.update(x)
    share = (stats.rows()[:, 0] == 1000).float().mean()
    assert float(share) < 4 / 2048, "each of the 32 among 8192 rows would be 8 / 2048"
    seen = stats.rows()
    assert torch.equal(stats.rows(), seen) and len({tuple(r) for r in seen.tolist()}) > SAMPLE / 3 - 32


def test_statistics_without_pairs_know_the_same_but_the_error_of_a_sample():
    """Of some 2048 rows: the error of their mean is a few per cent."""
    torch.manual_seed(0)
    rows = torch.randn(6000, 24) * torch.linspace(0.1, 3, 24)
    whole, part = InputStats(24), InputStats(24, paired=False)
    for stats in (whole, part):
        for chunk in rows.split(1000):
            stats.update(chunk)
    assert torch.allclose(whole.second_moment, part.second_moment, rtol=1e-5) and part.hessian.numel() == 0
    difference = torch.randn(8, 24)
    assert part.output_error(difference) == pytest.approx(whole.output_error(difference), rel=0.05)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("padding", ["same", "valid", (2, 1)])
def test_rows_of_a_convolution_are_what_it_multiplies(padding, mode):
    conv = nn.Conv2d(3, 5, (3, 4), padding=padding, padding_mode=mode)
    x = torch.randn(2, 3, 8, 9)
    rows = input_rows(conv, x)
    y = conv(x)
    found = (rows @ matrix_of(conv).t() + conv.bias).reshape(2, *y.shape[2:], 5).movedim(-1, 1)
    torch.testing.assert_close(found, y, rtol=1e-4, atol=1e-5)

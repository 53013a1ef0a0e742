"""Float products: as torch's own, whoever computes them."""

import pytest
import torch
import torch.nn.functional as F

from tritkit.kernels import floats


@pytest.fixture
def onednn(monkeypatch):
    """Counts the products that oneDNN computes."""
    if floats._onednn is None:
        pytest.skip("this torch was built without oneDNN")
    calls, real = [], floats._onednn
    monkeypatch.setattr(floats, "_onednn", lambda *args: calls.append(args) or real(*args))
    return calls


@pytest.mark.parametrize("shape", [(64, 576), (2, 33, 576), (4, 1, 40, 96)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_is_torchs(onednn, shape, bias):
    x, w, b = torch.randn(shape), torch.randn(48, shape[-1]), torch.randn(48) if bias else None
    found = floats.linear(x, w, b)
    assert len(onednn) == 1 and found.shape == (*shape[:-1], 48)
    exact = F.linear(x.double(), w.double(), None if b is None else b.double())
    assert (found - exact).abs().max() <= 1e-6 * shape[-1] ** 0.5 * exact.abs().max()


def test_views_are_read_as_they_lie(onednn):
    x, w = torch.randn(96, 64).t(), torch.randn(96, 80)[:, ::2].t().contiguous().t()
    wide = torch.randn(64, 300)[:, 100:140]
    torch.testing.assert_close(floats.linear(wide, w), wide.contiguous() @ w.contiguous().t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(floats.second_moment(x), x.t() @ x, rtol=1e-4, atol=1e-4)
    assert len(onednn) == 2


@pytest.mark.parametrize("case", ["trained", "double", "few", "bfloat16", "autocast", "none"])
def test_what_it_is_not_for_goes_torchs_way(onednn, case):
    kind = {"double": torch.float64, "bfloat16": torch.bfloat16}.get(case, torch.float32)
    rows = {"few": 4, "none": 0}.get(case, 64)
    x, w = torch.randn(rows, 32, dtype=kind), torch.randn(8, 32, dtype=kind, requires_grad=case == "trained")
    with torch.autocast("cpu", enabled=case == "autocast"):
        y = floats.linear(x, w)
        assert torch.equal(y, F.linear(x, w)) and not onednn
    if case == "trained":
        y.sum().backward()
        torch.testing.assert_close(w.grad, x.sum(0).expand_as(w))
    with torch.no_grad():
        floats.linear(x, w)
    assert len(onednn) == (case in ("trained", "autocast"))  # now as all others


def test_second_moments_are_symmetric_sums(onednn):
    rows = torch.randn(100, 48)
    found = floats.second_moment(rows)
    assert len(onednn) == 1
    torch.testing.assert_close(found, (rows.double().t() @ rows.double()).float(), rtol=1e-5, atol=1e-4)

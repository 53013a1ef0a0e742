"""Range methods against NVIDIA's calibrators, written out here bin by bin, and against numpy."""

import math

import numpy as np
import pytest
import torch

from tritkit.formats import format_of
from tritkit.methods.histogram import BINS, MOST, Histogram
from tritkit.methods.ranges import RANGES, RangeObserver, choose

INT8, INT4 = format_of("int8_tensor"), format_of("int4_tensor")


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def samples() -> dict[str, list[torch.Tensor]]:
    """Batches as activations come: round, heavy-tailed, one-sided with many zeros, growing, with an outlier."""
    return {
        "gaussian": [random(0, 300, 64)],
        "heavy": [random(1, 300, 64).pow(3), random(2, 300, 64).pow(3)],
        "rectified": [random(3, 200, 64).relu_(), 1.7 * random(4, 200, 64).relu_()],
        "growing": [0.5 * random(5, 100, 64), random(6, 100, 64), 1.5 * random(7, 100, 64)],
        "outlier": [random(8, 100, 64), torch.cat([random(9, 100, 64), torch.full((1, 64), 9.0)])],
    }


def their_histogram(batches):
    """The numpy branch of NVIDIA's HistogramCalibrator.collect: |x| in 2048 bins, more of the same width later."""
    first = batches[0].abs().double().numpy()
    counts, edges = np.histogram(first, BINS, (0, first.max()))
    for batch in batches[1:]:
        x = batch.abs().double().numpy()
        bins = max(len(counts), math.ceil(x.max() / edges[1]))
        edges = np.arange(bins + 1) * edges[1]
        more = np.histogram(x, edges)[0]
        more[: len(counts)] += counts
        counts = more
    return counts, edges


def their_entropy(counts, edges, levels):
    """The loop of pytorch-quantization's _compute_amax_entropy, level by level (FACTS 10.4)."""
    bins = counts.astype(float).copy()
    bins[0] = bins[1]
    divergences = []
    for i in range(128, len(bins) + 1):
        level = np.digitize(np.arange(i), np.linspace(0, i, levels + 1)) - 1
        filled = bins[:i] > 0
        count, width = np.bincount(level, bins[:i], levels), np.bincount(level, filled, levels)
        p, q = bins[:i].copy(), np.where(filled, (count / np.maximum(width, 1))[level], 0)
        p[-1] += bins[i:].sum()
        p, q = p / p.sum(), q / q.sum()
        with np.errstate(divide="ignore"):
            divergences.append(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))
    last = len(divergences) - 1 - int(np.argmin(divergences[::-1]))
    return edges[last + 128]


def their_mse(counts, edges, hi):
    centers = (edges[1:] + edges[:-1]) / 2
    errors = []
    for i in range(128, len(centers)):
        scale = centers[i] / hi
        errors.append(((np.clip(np.round(centers / scale), -hi, hi) * scale - centers) ** 2 * counts).mean())
    return centers[128 + int(np.argmin(errors))]


def observed(batches, format, methods=None):
    observer = RangeObserver(format, methods)
    for batch in batches:
        observer.update(batch)
    return observer


@pytest.mark.parametrize("name", samples())
def test_histogram_is_theirs(name):
    batches = samples()[name]
    observer = observed(batches, INT8)
    counts, edges = their_histogram(batches)
    assert observer.histogram.counts.numpy().tolist() == counts.tolist()
    np.testing.assert_allclose(observer.histogram.edges.numpy(), edges, rtol=1e-12)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", samples())
def test_static_ranges_are_those_of_the_calibrators(name, bits):
    batches, format = samples()[name], format_of(f"int{bits}_tensor")
    counts, edges = their_histogram(batches)
    everything = torch.cat([b.flatten() for b in batches])
    cdf = np.cumsum(counts) / counts.sum()
    wanted = {
        "absmax": float(everything.abs().max()),
        "minmax": float(everything.max()),
        "percentile": edges[np.searchsorted(cdf, 0.9999)],
        "mse": their_mse(counts, edges, format.hi),
        "entropy": their_entropy(counts, edges, format.hi + 1),
    }
    found = observed(batches, format).ranges()
    assert list(found) == list(RANGES)
    assert {k: high for k, (_, high) in found.items()} == pytest.approx(wanted, rel=1e-6)
    assert found["minmax"][0] == float(everything.min())
    assert all(low == -high for k, (low, high) in found.items() if k != "minmax")


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "bits"), [("gaussian", 4), ("heavy", 8), ("outlier", 8)])
def test_static_ranges_are_those_of_modelopt(name, bits):
    """NVIDIA's package itself (pip install nvidia-modelopt). Its mse of release 0.47 passes the bits as the bias of its
    fake_tensor_quant and finds nothing, so that one is held to the formula above alone."""
    theirs = pytest.importorskip("modelopt.torch.quantization.calib.histogram", exc_type=ImportError)
    calibrator = theirs.HistogramCalibrator(num_bits=bits)
    observer = observed(samples()[name], format_of(f"int{bits}_tensor"))
    for batch in samples()[name]:
        calibrator.collect(batch)
    bin_ = observer.histogram.width
    for method in ("percentile", "entropy"):
        found, wanted = observer.ranges()[method][1], float(calibrator.compute_amax(method))
        assert found == pytest.approx(wanted, abs=0.01 * bin_ + 1e-5 * wanted), method


def test_ties_go_to_the_last_threshold():
    """The same count in every bin: many thresholds are equally good."""
    observer = RangeObserver(INT8, ["entropy"])
    observer.update(torch.cat([torch.arange(BINS) / BINS + 0.5 / BINS, torch.ones(1)]))
    assert observer.histogram.counts[:-1].unique().tolist() == [1]
    low, high = observer.ranges()["entropy"]
    counts, edges = observer.histogram.counts.numpy(), observer.histogram.edges.numpy()
    assert high == pytest.approx(their_entropy(counts, edges, 128)) and low == -high


def test_bins_beyond_the_most_merge_and_keep_their_counts():
    for signed in (False, True):
        histogram = Histogram(signed)
        histogram.update(random(0, 5000))
        width = histogram.width
        histogram.update(100 * random(1, 5000))
        assert len(histogram.counts) <= MOST + BINS and int(histogram.counts.sum()) == 10000
        ratio = histogram.width / width
        assert ratio == 2 ** round(math.log2(ratio)) and ratio > 1
        both = torch.cat([random(0, 5000), 100 * random(1, 5000)])
        both = (both if signed else both.abs()).double().numpy()
        wanted = np.histogram(both, histogram.edges.numpy())[0]
        assert np.abs(histogram.counts.numpy() - wanted).max() <= 1  # a value may lie on an edge to the last bit
        assert histogram.edges[0] <= both.min() and both.max() <= histogram.edges[-1]


def test_zeros_before_the_first_value_are_counted():
    observer = RangeObserver(INT8, ["percentile"])
    with pytest.raises(ValueError, match="there were none"):
        observer.ranges()
    observer.update(torch.zeros(4, 5))
    assert observer.ranges() == {"percentile": (0, 0)} and observer.grid("percentile").scale == 1
    observer.update(torch.ones(1, 2))
    assert observer.histogram.counts[0] == 20 and observer.histogram.counts[-1] == 2
    assert observer.histogram.counts.sum() == 22


def test_asymmetric_static_ranges():
    format = format_of("int8_tensor_asym")
    batches = [random(0, 200, 64).exp(), -random(1, 200, 64).exp()]
    everything = torch.cat([b.flatten() for b in batches]).double()
    observer = observed(batches, format)
    found = observer.ranges()
    assert list(found) == ["absmax", "minmax", "percentile", "mse"]
    low, high = everything.min().item(), everything.max().item()
    assert found["minmax"] == (low, high) and found["absmax"] == (-high, high)
    bin_ = observer.histogram.width
    # counted once more: the edge of the bin that holds the quantile, the one nearer to zero
    edges = np.arange(math.floor(low / bin_), math.ceil(high / bin_) + 1) * bin_
    share = np.cumsum(np.histogram(everything.numpy(), edges)[0]) / len(everything)
    last = edges[:-1][share >= 0.99995][0]
    first = edges[1:][share > 0.00005][0]
    assert found["percentile"] == (pytest.approx(first, abs=0.01 * bin_), pytest.approx(last, abs=0.01 * bin_))
    assert low < first - 2 * bin_ < first < last < last + 2 * bin_ < high  # something is cut off on both sides
    turned = observed([-b for b in batches], format).ranges()["percentile"]
    assert turned == (pytest.approx(-last, abs=1.01 * bin_), pytest.approx(-first, abs=1.01 * bin_))

    def error(range_):
        grid = format.grid_of(*(torch.full((1, 1, 1), v) for v in range_))
        w = everything.float().reshape(1, 1, -1)
        return float((format.decode(format.encode(w, grid), grid) - w).square().mean())

    assert error(found["mse"]) < min(error(found["minmax"]), error(found["percentile"])) * 1.001
    scales = [error((low * a, high * b)) for a in (1, 0.95, 0.8) for b in (1, 0.9, 0.7, 0.5, 0.3)]
    assert error(found["mse"]) <= min(scales) * 1.01


@pytest.mark.parametrize("name", ["int8_tensor", "int4_tensor", "int8_tensor_asym"])
def test_grid_of_a_range_covers_it(name):
    observer = observed(samples()["heavy"], format_of(name))
    for method, (low, high) in observer.ranges().items():
        grid = observer.grid(method)
        ends = observer.format.decode(
            observer.format.encode(torch.tensor([[[low, high]]]), grid), grid
        ).flatten()  # an asymmetric end is half a step away from a code at most
        assert torch.allclose(ends, torch.tensor([low, high]), atol=float(grid.scale) * 0.51), method


def test_percentiles_of_weights_are_numpys():
    for name, shape in {"int4_g64": (8, 192), "int4_row": (3, 3000), "int8_tensor": (40, 700)}.items():
        format, w = format_of(name), random(0, *shape)
        rows = format.split(w)
        grid = choose(rows, format, "percentile")
        wanted = np.quantile(rows.abs().double().numpy(), 0.9999, axis=-1, keepdims=True)
        assert grid.scale.shape == (*rows.shape[:2], 1)
        np.testing.assert_allclose((grid.scale * format.hi).numpy(), wanted, rtol=6e-4)  # float16 scales of groups
        asym = format_of(name + "_asym")
        ends = [np.quantile(rows.double().numpy(), q, axis=-1, keepdims=True) for q in (0.00005, 0.99995)]
        wanted = asym.grid_of(*(torch.from_numpy(e).float() for e in ends))
        assert torch.allclose(choose(rows, asym, "percentile").scale, wanted.scale, rtol=1e-3)


def test_the_plain_ranges_are_the_fit_of_the_format():
    w = random(0, 16, 128)
    for name, method in {"int4_g32": "absmax", "int3_row": "minmax", "int4_g32_asym": "minmax"}.items():
        format = format_of(name)
        grid, wanted = choose(format.split(w), format, method), format.fit(format.split(w))
        assert torch.equal(grid.scale, wanted.scale) and torch.equal(grid.inverse, wanted.inverse)
        assert (grid.offset is None) == (wanted.offset is None)
        assert wanted.offset is None or torch.equal(grid.offset, wanted.offset)


@pytest.mark.parametrize("name", ["int4_g32", "int3_row", "int2_tensor", "int4_g32_asym", "int2_row_asym"])
def test_mse_of_weights_is_the_best_of_gptqs_grid(name):
    """Group by group in a loop, against the vectorised search."""
    format, w = format_of(name), random(0, 6, 96).pow(3)
    rows = format.split(w)
    grid = choose(rows, format, "mse")
    for r in range(rows.shape[0]):
        for g in range(rows.shape[1]):
            x = rows[r : r + 1, g : g + 1]
            low, high = x.min().clamp(max=0), x.max().clamp(min=0)
            if format.symmetric:
                high = x.abs().max()
                low = -high
            errors = []
            for i in range(80):
                shrink = 1 - i / 100
                one = format.grid_of((shrink * low).reshape(1, 1, 1), (shrink * high).reshape(1, 1, 1))
                errors.append((format.decode(format.encode(x, one), one) - x).square().sum())
            found = format.decode(format.encode(x, one := _part(grid, r, g)), one)
            assert (found - x).square().sum() == pytest.approx(float(min(errors)), rel=1e-5)
    assert _error(rows, format, grid) < _error(rows, format, format.fit(rows))


def _part(grid, r, g):
    offset = None if grid.offset is None else grid.offset[r : r + 1, g : g + 1]
    return type(grid)(grid.scale[r : r + 1, g : g + 1], grid.inverse[r : r + 1, g : g + 1], offset)


def _error(rows, format, grid):
    return float((format.decode(format.encode(rows, grid), grid) - rows).square().sum())


def test_entropy_of_weights():
    format, w = format_of("int8_row"), random(0, 2, 6000)
    grid = choose(format.split(w), format, "entropy")
    for row, scale in zip(w, grid.scale.flatten(), strict=True):
        counts, edges = their_histogram([row])
        assert float(scale) * 127 == pytest.approx(their_entropy(counts, edges, 128), rel=1e-6)


def test_what_makes_no_sense_is_refused():
    w = random(0, 4, 64)
    with pytest.raises(ValueError, match=r"int4_g32 has 32 weights .* mse"):
        choose(format_of("int4_g32").split(w), format_of("int4_g32"), "entropy")
    with pytest.raises(ValueError, match="int8_row_asym has two ends"):
        choose(w.reshape(4, 1, 64), format_of("int8_row_asym"), "entropy")
    with pytest.raises(ValueError, match="int8_tensor_asym has two ends"):
        RangeObserver(format_of("int8_tensor_asym"), ["entropy"])
    with pytest.raises(ValueError, match="'kl'; known are absmax, minmax, percentile, mse, entropy"):
        choose(w.reshape(4, 1, 64), INT8, "kl")
    with pytest.raises(ValueError, match="nf4 has a grid of its own"):
        choose(w.reshape(4, 1, 64), format_of("nf4"), "mse")
    with pytest.raises(ValueError, match="'max'; known"):
        RangeObserver(INT8, ["max"])
    with pytest.raises(ValueError, match="int8_row has one per row"):
        RangeObserver(format_of("int8_row"))
    with pytest.raises(ValueError, match="2 of these 4 are not"):
        RangeObserver(INT8).update(torch.tensor([1.0, math.nan, math.inf, 0.0]))


@pytest.mark.parametrize("method", [m for m in RANGES if m != "entropy"])
@pytest.mark.parametrize("name", ["int4_g32", "int4_row_asym", "int8_tensor"])
def test_constant_and_zero_groups_stay_finite(name, method):
    format = format_of(name)
    for value in (0.0, 1e-30, 3.0, -3.0):
        rows = format.split(torch.full((2, 64), value))
        grid = choose(rows, format, method)
        assert grid.scale.isfinite().all() and (grid.scale > 0).all()
        found = format.decode(format.encode(rows, grid), grid)
        assert (
            (found - rows).abs() <= 2e-3 * rows.abs() + 0.5 * grid.scale * (format.has_offset or value < 1e-6)
        ).all()


@pytest.mark.parametrize("name", ["int8_row", "int4_tensor"])
def test_entropy_of_zeros_is_no_range(name):
    format = format_of(name)
    w = random(0, 2, 4096)
    w[0] = 0
    grid = choose(format.split(w), format, "entropy")
    rows = grid.scale.flatten()
    assert (rows > 0).all() and rows.isfinite().all()
    assert name != "int8_row" or rows[0] == 1
    assert (choose(format.split(torch.zeros(2, 4096)), format, "entropy").scale == 1).all()


@pytest.mark.parametrize("name", ["int8_tensor", "int8_tensor_asym"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_percentile_of_values_beside_one_massive_one_is_a_range(name, sign):
    """All but one of a million lie in the first bin: its lower edge is 0."""
    values = sign * 0.4 * torch.rand(1_000_000, generator=torch.Generator().manual_seed(1))
    values[7] = sign * 1000
    observer = observed([values], format_of(name))
    low, high = observer.ranges()["percentile"]
    assert max(-low, high) == pytest.approx(observer.histogram.width) and 0.4 < max(-low, high) < 0.6
    grid = observer.grid("percentile")
    assert grid.scale.item() < 0.6 / 100

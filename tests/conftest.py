"""What the tests share: small random models as folders, and the data folder that a checkout may have beside it."""

import signal
from pathlib import Path

import pytest

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
WORDS = "the cat sat on a mat and saw the moon over the hill while two owls sang of rain".split()  # noqa: SIM905


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard():
    """A process that was started in the background may have been told to ignore Ctrl-C; several tests press it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the data folder ../shared/data is not there")
    return SHARED


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """60 documents of nonsense English, some with characters outside ASCII."""
    import random

    chance = random.Random(0)
    lines = []
    for _ in range(60):
        words = [chance.choice(WORDS) for _ in range(chance.randint(40, 120))]
        lines.append(" ".join(words).capitalize() + ". Café — naïve?\n<|endoftext|>\n")
    path = tmp_path_factory.mktemp("text") / "nonsense.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer(text_file):
    from tritkit.data import documents
    from tritkit.tokenizer import Tokenizer

    return Tokenizer.train(documents([text_file]), 320)


@pytest.fixture
def make_folder(tmp_path, tokenizer):
    """make_folder("b158") writes a latent folder with random weights and returns its path."""
    from tritkit.models.config import ModelConfig
    from tritkit.models.transformer import build
    from tritkit.trainstate import save_model

    formats = {
        "llama": ("llama", None, None),
        "b158": ("bitnet", "ternary", "a8"),
        "b1": ("bitnet", "binary", "a8_q128"),
    }

    def make(kind: str, seed: int = 0, **changes) -> Path:
        family, weights, activations = formats[kind]
        sizes: dict = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"max_position_embeddings": 128, "initializer_range": 0.1}
        config = ModelConfig(**({"family": family, "weights": weights, "activations": activations} | sizes | changes))
        folder = tmp_path / f"{kind}-{seed}"
        model = build(config, seed=seed)
        _vary_norms(model, seed)
        save_model(folder, model, config, tokenizer)
        return folder

    return make


@pytest.fixture
def make_model(tmp_path, tokenizer):
    """make_model("qwen3", rope=...) writes a full-precision folder with random weights, biases and norms."""
    import torch

    from tritkit.models.config import ModelConfig
    from tritkit.models.transformer import build
    from tritkit.trainstate import save_model

    def make(family: str, **changes):
        sizes: dict = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
        config = ModelConfig(family=family, initializer_range=0.1, **(sizes | changes))
        model = build(config, seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() == 1:
                    p.copy_(1 + 0.3 * torch.randn(p.shape, generator=generator))
        folder = tmp_path / family
        save_model(folder, model, config, tokenizer)
        return folder

    return make


def _vary_norms(model, seed: int) -> None:
    """Norm weights of a fresh model are all one, which would hide a norm that is used in the wrong place."""
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))

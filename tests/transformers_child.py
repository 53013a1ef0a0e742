"""What plain transformers makes of folders, in a process of its own: logits into a file for each folder.

Run as: python -P transformers_child.py {plain|tritkit|late|by-name} TOKENS.npy FOLDER OUT.npy [FOLDER OUT.npy ...].
With "plain" any import of tritkit fails, so that nothing of ours can help; "by-name" is that too and loads with the
family's own class; "late" imports tritkit after transformers. In OUT.npy are float32 logits; where loading failed there
is OUT.npy.error with the message.
"""

import importlib.abc
import json
import sys


class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "tritkit":
            raise ImportError("tritkit is not to be imported here")


mode, tokens_file, *rest = sys.argv[1:]
if mode in ("plain", "by-name"):
    sys.meta_path.insert(0, Blocked())
elif mode == "tritkit":
    import tritkit

    assert "torch" not in sys.modules and "transformers" not in sys.modules

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

if mode == "late":
    import tritkit  # noqa: F401

tokens = torch.from_numpy(np.load(tokens_file))
for folder, out in zip(rest[::2], rest[1::2], strict=True):
    try:
        kind = AutoModelForCausalLM
        if mode == "by-name":  # of the family, whatever config.json calls itself
            with open(f"{folder}/config.json") as file:
                family = json.load(file)["model_type"].removeprefix("tritkit_")
            kind = {"llama": transformers.LlamaForCausalLM, "bitnet": transformers.BitNetForCausalLM}.get(family)
            kind = kind or transformers.Qwen2ForCausalLM
        model = kind.from_pretrained(folder, dtype=torch.float32).eval()
        ids = AutoTokenizer.from_pretrained(folder)("The cat sat on a naïve mat.")["input_ids"]
    except Exception as error:
        with open(f"{out}.error", "w") as file:
            file.write(f"{type(error).__name__}: {error}")
        continue
    model = torch.nn.Module.float(model)  # what is not quantised stays bfloat16 in a BitNet folder
    with torch.no_grad():
        logits = model(tokens).logits
    np.save(out, logits.numpy())
    np.save(out + ".ids.npy", np.array(ids))
if mode in ("plain", "by-name"):
    assert not any(name.partition(".")[0] == "tritkit" for name in sys.modules)

"""llama.cpp, the one inside llama-cpp-python, on a GGUF file: tokens, greedy continuations, perplexity."""

import contextlib
import os

import numpy as np


class Peer:
    """threads: of llama.cpp. It keeps keys and values in float32, so that only the weights' rounding is compared."""

    def __init__(self, path, context=512, threads=2):
        import llama_cpp

        self.lib, self.context = llama_cpp, context
        f32 = llama_cpp.GGML_TYPE_F32
        with quiet():
            self.model = llama_cpp.Llama(
                model_path=str(path),
                n_ctx=context,
                n_batch=context,
                n_ubatch=context,
                n_threads=threads,
                n_threads_batch=threads,
                logits_all=True,
                verbose=False,
                type_k=f32,
                type_v=f32,
            )
        vocabulary = llama_cpp.llama_model_get_vocab(self.model._model.model)
        self.adds_bos = bool(llama_cpp.llama_vocab_get_add_bos(vocabulary))

    def encode(self, text: str, bos: bool = True, special: bool = True) -> list[int]:
        return self.model.tokenize(text.encode(), add_bos=bos and self.adds_bos, special=special)

    def logits(self, ids: list[int]) -> np.ndarray:
        """float32 [tokens, vocabulary]."""
        self.model.reset()
        self.model.eval(list(ids))
        return np.array(self.model.scores[: len(ids)])

    def greedy(self, ids: list[int], count: int) -> list[int]:
        self.model.reset()
        self.model.eval(list(ids))
        made: list[int] = []
        for _ in range(count):
            made.append(int(np.argmax(self.model.scores[len(ids) + len(made) - 1])))
            self.model.eval(made[-1:])
        return made

    def perplexity(self, text: str, chunks: int, context: int) -> float:
        """llama.cpp's protocol: the second halves of chunks that follow each other, BOS in the place of the first."""
        ids = self.encode(text)
        losses = []
        for start in range(0, min(chunks * context, len(ids) - context + 1), context):
            chunk = ids[start : start + context]
            given = [self.model.token_bos(), *chunk[1:]] if self.adds_bos else chunk
            half = context // 2
            scores = self.logits(given)[half : context - 1].astype(np.float64)
            top = scores.max(-1)
            total = np.log(np.exp(scores - top[:, None]).sum(-1)) + top
            losses.append(total - scores[np.arange(len(scores)), chunk[half + 1 :]])
        return float(np.exp(np.mean(losses)))

    def close(self) -> None:
        self.model.close()


@contextlib.contextmanager
def quiet():
    """llama.cpp writes to the process's stderr."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)

"""The native engine: the whole forward step in C++ (csrc/decoder.cpp), on CPU threads, without torch."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from tritkit import _native
from tritkit.engine import Job, checked
from tritkit.engine.weights import BLOCKS, FLOATS, DecoderWeights, LayerWeights, LinearWeights, check
from tritkit.memory import available_memory

# Tokens in one native call: short enough that Ctrl-C is heard and that what lies between the layers stays small, long
# enough that unpacking the weights costs nothing (256 are no faster, docs/log.md).
CHUNK = 128
LARGE_HEAD = 2**24  # bytes
# Forms of the output head -> bits of its copy (0: none). float: the weights as they are stored, in blocks or not;
# screen: 4 bits say which logits could be high, and these are computed from the weights as they are.
HEADS = {"float": 0, "int8": 8, "int6": 6, "int4": 4, "screen": 4}
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("input_norm", "post_attention_norm", "attn_sub_norm", "ffn_sub_norm", "q_norm", "k_norm")


def usable_cores() -> int:
    """Cores that this process may run on."""
    return _native.usable_cores()


class NativeEngine:
    """Runs `weights` on `threads` threads (0: all usable cores) with the kernels of `isa` (None: the fastest).

    kv_bits: width of the cached keys and values. 32: as computed; 16: float16; 8, 4, 3: codes with a float16 scale for
    each token and head, the first token of a sequence at 8. ValueError for any other.

    head: a form of the output head (HEADS; None: `default_head`). float: as it is stored; `head` of the engine is then
    the layout where that is one of codes. int8: a scale a row, times activations of 16 bits. int6, int4: a scale for
    32 columns of a row, times activations of 8 bits in the same groups. With "screen" the logits that "last" asks for
    are exact where they could be the highest and those of 4 bits with a scale a row elsewhere, which suits greedy
    decoding; "all" and "nll" are exact.

    layout: of ternary weights: t16_2; t16_3; l64_3, where what a ReLU^2 gate makes zero is not read, and t16_3 or t16_2
    elsewhere (None: what is fastest with these kernels and this shape). The results are the same, bit for bit.

    density: to measure speed, makes the l64_3 layout read these shares of up's rows and of down's columns, whatever the
    gate says; the logits then mean nothing.

    Codes are copied into the layout that the kernels read. Floats are read where they lie, the embedding always and
    linears where their rows are whole vectors; so their arrays must stay as they are while the engine lives. The pages
    of arrays that map a file are given back behind the copying.

    ValueError where the weights do not fit together or there are fewer cores than `threads`, MemoryError where the
    copies would not fit into memory, both before anything is copied. `close` frees memory and threads; so does the end
    of a `with` block.
    """

    name = "native"

    def __init__(
        self,
        weights: DecoderWeights,
        threads: int = 0,
        isa: str | None = None,
        kv_bits: int = 16,
        head: str | None = None,
        layout: str | None = None,
        density: tuple[float, float] | None = None,
    ):
        check(weights)
        cores = usable_cores()
        if threads < 0:
            raise ValueError(f"threads is {threads}, expected 0 (all usable cores) or more")
        if threads > cores:
            raise ValueError(f"threads is {threads}, but there are only {cores} usable cores")
        if head is None:
            head = default_head(weights)
        if head not in HEADS:
            raise ValueError(f"head is {head!r}, expected one of {', '.join(HEADS)}")
        runner = _native.Runner(threads, isa or "", layout or "")
        _require_memory(runner, weights, head)
        self.vocab_size = weights.shape.vocab_size
        self.context_length = weights.shape.context_length
        self.isa: str = runner.isa
        self.threads: int = runner.threads
        skips = _skips(weights)
        layers = [_layer(runner, f"layers[{i}]", layer, skips) for i, layer in enumerate(weights.layers)]
        tied = weights.head is None
        output = weights.embedding if weights.head is None else weights.head
        blocks = output.layout not in FLOATS
        rows = _rows(weights.embedding, drop_pages=not tied or head != "float" or blocks)
        built_head = _head(runner, head, output, rows, tied)
        self.head: str = output.layout if head == "float" and blocks else head
        self.head_layout: str = built_head.layout
        self._head: _native.Head | None = built_head
        self.layout: str = "+".join(sorted({layer[name].layout for layer in layers for name in LINEARS}))
        self._open: _native.Decoder | None = _native.Decoder(
            runner,
            dataclasses.asdict(weights.shape),
            rows,
            layers,
            np.ascontiguousarray(weights.final_norm),
            built_head,
            kv_bits,
            density,
        )
        self.kv_bits: int = self._decoder.kv_bits

    @property
    def _decoder(self) -> _native.Decoder:
        if self._open is None:
            raise ValueError("the engine is closed")
        return self._open

    def close(self) -> None:
        """Frees memory and threads. Once is enough, more does no harm; the engine cannot be used afterwards."""
        self._open = self._head = None

    def __enter__(self) -> "NativeEngine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights, in the layouts of the kernels, that decoding one token reads, on average so far."""
        return round(self._decoder.bytes_per_token)

    @property
    def density(self) -> tuple[float, float]:
        """Shares of up's rows and of down's columns that decoding has read, on average so far."""
        return self._decoder.density

    @property
    def ffn_bytes(self) -> tuple[int, int]:
        """Bytes of gate, up and down that decoding one token reads, on average so far, and that there are."""
        return round(self._decoder.ffn_bytes_per_token), self._decoder.ffn_bytes

    @property
    def rescored_rows(self) -> float:
        """Logits that a screened head computed again, on average for each token; 0 without screening."""
        head = self._head
        return head.rescored_rows / head.screened_tokens if head is not None and head.screened_tokens else 0.0

    @property
    def kv_bytes_per_position(self) -> float:
        """Bytes of keys and values, scales and padding included, that one token takes and each later one reads."""
        return self._decoder.kv_bytes_per_position

    def new(self) -> int:
        return self._decoder.new()

    def fork(self, sequence: int) -> int:
        return self._decoder.fork(sequence)

    def truncate(self, sequence: int, n: int) -> None:
        self._decoder.truncate(sequence, n)

    def free(self, sequence: int) -> None:
        self._decoder.free(sequence)

    def length(self, sequence: int) -> int:
        return self._decoder.length(sequence)

    def step(self, jobs: Sequence[Job]) -> list[NDArray[np.float32] | None]:
        """See `Engine.step`."""
        decoder = self._decoder
        jobs = checked(jobs, self)
        lengths = {job.sequence: self.length(job.sequence) for job in jobs}
        results: list[list[NDArray[np.float32]]] = [[] for _ in jobs]
        try:
            for batch in _batches(jobs):
                outputs = decoder.step([_fields(piece) for _, piece in batch])
                for (i, _), output in zip(batch, outputs, strict=True):
                    if output is not None:
                        results[i].append(output)
        except BaseException:
            for sequence, n in lengths.items():
                self.truncate(sequence, n)
            raise
        return [None if not parts else parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in results]


def _skips(weights: DecoderWeights) -> dict[str, str]:
    """What need not be computed: with ReLU^2, rows of up that are multiplied by 0 and columns of down in front of 0."""
    return {"up": "outputs", "down": "inputs"} if weights.shape.activation == "relu2" else {}


def _layer(runner: _native.Runner, name: str, layer: LayerWeights, skips: dict[str, str]) -> dict:
    built = {
        linear: _linear(runner, f"{name}.{linear}", getattr(layer, linear), skips.get(linear, "nothing"))
        for linear in LINEARS
    }
    norms = {norm: getattr(layer, norm) for norm in NORMS}
    norms |= {f"{linear}_own_norm": getattr(layer, linear).norm for linear in LINEARS}
    for norm, value in norms.items():
        built[norm] = None if value is None else np.ascontiguousarray(value)
    built["adapter"] = None if layer.adapter is None else _linear(runner, f"{name}.adapter", layer.adapter)
    return built


def _linear(runner: _native.Runner, name: str, w: LinearWeights, skip: str = "nothing") -> _native.Linear:
    data = np.ascontiguousarray(w.data)
    bias = None if w.bias is None else np.ascontiguousarray(w.bias)
    try:
        if w.groups is not None:
            built = _native.GroupedLinear(runner, data, **_groups(w), scale=float(w.scale), bias=bias)
        else:
            built = _native.Linear(
                *(runner, w.layout, data, w.rows, w.cols, float(w.scale), w.activations, bias),
                mapped=_is_mapped(w.data),
                skip=skip,
            )
        if w.inputs is not None:
            i = w.inputs
            grid = _native.InputGrid(i.lo, i.hi, i.group, i.asymmetric, i.scale, i.zero, i.peak)
            built.round_inputs(grid, i.row_sums)
        return built
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _groups(w: LinearWeights) -> dict:
    """The words of `_native` for the groups of a matrix."""
    assert w.groups is not None
    g = w.groups
    return {"bits": g.bits, "group": g.size, "cols": w.cols, "field_bits": g.field_bits, **g.arrays()}


def default_head(weights: DecoderWeights) -> str:
    """The form of the output head where none is asked for: large ones get 8 bits, small ones stay as they are."""
    w = weights.embedding if weights.head is None else weights.head
    return "int8" if w.layout in FLOATS and w.bias is None and w.data.nbytes >= LARGE_HEAD else "float"


def _rows(w: LinearWeights, drop_pages: bool) -> _native.RowTable:
    data = np.ascontiguousarray(w.data)
    if w.groups is not None:
        return _native.RowTable.grouped(data, **_groups(w), scale=float(w.scale))
    return _native.RowTable(w.layout, data, w.rows, w.cols, float(w.scale), drop_pages and _is_mapped(w.data))


def _head(runner: _native.Runner, kind: str, w: LinearWeights, embedding: _native.RowTable, tied: bool) -> _native.Head:
    if kind == "float":
        return _native.Head(_linear(runner, "head", w))
    if w.layout not in (*FLOATS, *BLOCKS, "grouped") or w.bias is not None:
        raise ValueError(f"head is {kind!r}, but only a head of floats or blocks without a bias can be made smaller")
    if kind == "screen" and w.layout not in FLOATS:
        raise ValueError(f"head is 'screen', but only a head of floats can be screened, not one of {w.layout}")
    rows = embedding if tied else _rows(w, drop_pages=True)
    exact = _linear(runner, "head", w) if kind == "screen" else None
    return _native.Head(runner, rows, HEADS[kind], exact)


def _is_mapped(data: NDArray | None) -> bool:
    """Whether the array is a part of a file that is mapped for reading, whose pages can come from there again."""
    while isinstance(data, np.ndarray):
        if isinstance(data, np.memmap) and data.mode == "r":
            return True
        data = data.base
    return False


def _runtime_bytes(runner: _native.Runner, w: LinearWeights, skip: str = "nothing") -> int:
    if w.groups is not None:
        return _native.grouped_bytes(np.ascontiguousarray(w.data), **_groups(w))
    return _native.runtime_bytes(runner, w.layout, w.data, w.rows, w.cols, w.activations, skip)


def _require_memory(runner: _native.Runner, weights: DecoderWeights, head: str) -> None:
    """MemoryError where the copies of the weights are larger than the memory that there is."""
    skips = _skips(weights)
    linears = [(getattr(layer, name), skips.get(name, "nothing")) for layer in weights.layers for name in LINEARS]
    linears += [(layer.adapter, "nothing") for layer in weights.layers if layer.adapter is not None]
    output = weights.embedding if weights.head is None else weights.head
    if head in ("float", "screen"):
        linears.append((output, "nothing"))
    needed = output.rows * output.cols * (2 * HEADS[head] + 1) // 16  # half a bit: scales of groups
    needed += sum(_runtime_bytes(runner, w, skip) for w, skip in linears)
    available = available_memory()
    if available is not None and needed > available:
        raise MemoryError(
            f"the weights need {needed / 2**20:.0f} MiB of memory, but only {available / 2**20:.0f} MiB are available"
        )


def _fields(job: Job) -> tuple:
    return (job.sequence, job.tokens, job.want, job.targets)


def _batches(jobs: list[Job]) -> Iterator[list[tuple[int, Job]]]:
    """The jobs cut into batches of at most CHUNK tokens: (index of the job, a piece of it)."""
    batch: list[tuple[int, Job]] = []
    room = CHUNK
    for i, job in enumerate(jobs):
        at, end = 0, len(job.tokens)
        while at < end:
            to = min(end, at + room)
            want = "none" if job.want == "last" and to < end else job.want
            targets = None if job.targets is None else job.targets[at:to]
            batch.append((i, Job(job.sequence, job.tokens[at:to], want, targets)))
            room -= to - at
            at = to
            if room == 0:
                yield batch
                batch, room = [], CHUNK
    if batch:
        yield batch

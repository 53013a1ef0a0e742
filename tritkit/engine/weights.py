"""The weights of a decoder as the native engine takes them: numpy arrays as they are in a file, and what they mean."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DTYPES = {  # layout of a file -> what numpy calls its bytes
    "hf_autobitlinear": np.uint8,
    "hf_bitlinear": np.uint8,
    "binary_rows": np.uint8,
    "f32": np.float32,
    "f16": np.uint16,
    "bf16": np.uint16,
    "grouped": np.uint8,
}
FLOATS = ("f32", "f16", "bf16")
BLOCKS = {  # layout of blocks -> columns and bytes of a block; csrc/ggml_blocks.h draws them
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q8_0": (32, 34),
    "q2_k": (256, 84),
    "q3_k": (256, 110),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
    "tq1_0": (256, 54),
    "tq2_0": (256, 66),
    "i2_s_x86": (128, 32),
    "i2_s_arm": (64, 16),
}
TERNARY_BLOCKS = ("tq1_0", "tq2_0", "i2_s_x86", "i2_s_arm")
DTYPES |= dict.fromkeys(BLOCKS, np.uint8)


@dataclass(frozen=True)
class DecoderShape:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inverse_frequencies: NDArray[np.float32]  # [head_dim / 2]: turn of a pair of dimensions by one position
    rms_norm_eps: float
    activation: str  # silu, relu2
    sub_norms: bool  # norms before o and down
    context_length: int
    attention_factor: float = 1.0  # multiplies cos and sin
    qk_norms: bool = False  # norms of each query and key head, before they are rotated
    linear_norm_eps: float = 0.0  # of the norms that linears may have of their own


@dataclass(frozen=True)
class Groups:
    """What the codes of a matrix stand for where every `size` columns of a row have a scale of their own.

    With g the group and s the 256 columns that a column lies in, a weight is one of
      scales[g] * (code - 2^(bits - 1))        nothing but scales
      scales[g] * (code - zeros[g])
      scales[g] * code + offsets[g]
      scales[g] * code - dmin[s] * mins[g]
      scales[g] * table[code]                  bits = 4
    where scales[g] is d[s] * scales[g] if there is d. All arrays are [rows, groups] but for the table, [16], and d and
    dmin, [rows, ceil(cols / 256)]. size: a multiple of 16, with d or dmin one that divides 256, or at least cols, which
    gives each row one group.
    """

    bits: int
    size: int
    scales: NDArray  # float16 or float32; with d int8
    d: NDArray[np.float16] | None = None
    zeros: NDArray[np.uint8] | None = None
    offsets: NDArray | None = None  # float16 or float32
    mins: NDArray[np.uint8] | None = None
    dmin: NDArray[np.float16] | None = None
    table: NDArray[np.int16] | None = None
    field_bits: int = 8  # of a code in the data: 8, a byte each, or fewer, packed lowest first along a row

    def arrays(self) -> dict[str, NDArray]:
        """Those that there are, C-contiguous."""
        names = ("scales", "d", "zeros", "offsets", "mins", "dmin", "table")
        return {name: np.ascontiguousarray(a) for name in names if (a := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Inputs:
    """What the inputs of a linear are rounded to, x ~ scale * (code - zero) with lo <= code <= hi (csrc/input_grid.h).

    group: columns of a token that share a scale, a multiple of 32; 0: the whole token. asymmetric: lo is 0, and a token
    has a zero point. scale, zero: of all tokens; scale 0: found for each. peak: above 0, codes are x * peak / absmax.
    row_sums: of the weights, [rows], where asymmetric.
    """

    lo: int
    hi: int
    group: int = 0
    asymmetric: bool = False
    scale: float = 0.0
    zero: float = 0.0
    peak: float = 0.0
    row_sums: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class LinearWeights:
    """One matrix, y = scale * (codes @ x) + bias, or the floats themselves.

    data by layout:
      hf_autobitlinear, hf_bitlinear  uint8 [rows / 4, cols], strided along the rows (transformers' pack_weights)
      binary_rows                     uint8 [rows, ceil(cols / 8)], bit j of byte b: the code of column 8b + j is +1
      f32                             float32 [rows, cols]
      f16, bf16                       uint16 [rows, cols], the bits
      grouped                         uint8 [rows, ceil(cols * field_bits / 8)], codes that mean what `groups` says
      q4_0 ... q6_k                   uint8 [rows, bytes of a row], blocks as in a GGUF file (BLOCKS)
      tq1_0, tq2_0, i2_s_x86/_arm     the same, blocks of ternary codes
    `scale` multiplies, also for hf_bitlinear, whose file holds the inverse, and for i2_s, whose blocks have none.
    activations: a8, a8_q128 for packed layouts, a8_g32 for grouped and for blocks, None for floats. Blocks of ternary
    codes may have a8 or a8_q128 too: then they run as one ternary matrix, all of them have to have the same scale, and
    `scale` is that scale.
    norm: weights of a norm that this linear's input passes through first. inputs: instead of a8_g32, for grouped and
    for blocks.
    """

    layout: str
    data: NDArray
    rows: int
    cols: int
    scale: float = 1.0
    activations: str | None = None
    bias: NDArray[np.float32] | None = None
    groups: Groups | None = None
    norm: NDArray[np.float32] | None = None
    inputs: Inputs | None = None

    def data_shape(self) -> tuple[int, int]:
        if self.layout in ("hf_autobitlinear", "hf_bitlinear"):
            return (-(-self.rows // 4), self.cols)
        if self.layout == "binary_rows":
            return (self.rows, -(-self.cols // 8))
        if self.layout in BLOCKS:
            columns, size = BLOCKS[self.layout]
            return (self.rows, self.cols // columns * size)
        if self.groups is not None:
            return (self.rows, -(-self.cols * self.groups.field_bits // 8))
        return (self.rows, self.cols)


@dataclass(frozen=True)
class LayerWeights:
    q: LinearWeights
    k: LinearWeights
    v: LinearWeights
    o: LinearWeights
    gate: LinearWeights
    up: LinearWeights
    down: LinearWeights
    input_norm: NDArray[np.float32]
    post_attention_norm: NDArray[np.float32]
    attn_sub_norm: NDArray[np.float32] | None = None
    ffn_sub_norm: NDArray[np.float32] | None = None
    q_norm: NDArray[np.float32] | None = None
    k_norm: NDArray[np.float32] | None = None
    adapter: LinearWeights | None = None  # floats [hidden, hidden]: what is added for the layer's input


@dataclass(frozen=True)
class DecoderWeights:
    shape: DecoderShape
    embedding: LinearWeights
    layers: list[LayerWeights]
    final_norm: NDArray[np.float32]
    head: LinearWeights | None = None  # None: the embedding is the head


def check(weights: DecoderWeights) -> None:
    """ValueError with the name of the first tensor that does not fit the shape."""
    s = weights.shape
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"):
        if getattr(s, name) < 1:
            raise ValueError(f"{name} is {getattr(s, name)}, expected at least 1")
    if s.num_heads % s.num_kv_heads:
        raise ValueError(f"num_heads is {s.num_heads}, expected a multiple of num_kv_heads, {s.num_kv_heads}")
    if s.head_dim % 2:
        raise ValueError(f"head_dim is {s.head_dim}, expected an even number")
    if len(weights.layers) != s.num_layers:
        raise ValueError(f"there are {len(weights.layers)} layers, expected {s.num_layers}")
    q, kv = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
    linears = {
        "q": (q, s.hidden_size),
        "k": (kv, s.hidden_size),
        "v": (kv, s.hidden_size),
        "o": (s.hidden_size, q),
        "gate": (s.intermediate_size, s.hidden_size),
        "up": (s.intermediate_size, s.hidden_size),
        "down": (s.hidden_size, s.intermediate_size),
    }
    norms = {
        "input_norm": s.hidden_size,
        "post_attention_norm": s.hidden_size,
        "attn_sub_norm": q if s.sub_norms else None,
        "ffn_sub_norm": s.intermediate_size if s.sub_norms else None,
        "q_norm": s.head_dim if s.qk_norms else None,
        "k_norm": s.head_dim if s.qk_norms else None,
    }
    _check_norm("inverse_frequencies", s.inverse_frequencies, s.head_dim // 2)
    _check_linear("embedding", weights.embedding, (s.vocab_size, s.hidden_size))
    if weights.embedding.layout not in (*FLOATS, *BLOCKS, "grouped"):
        raise ValueError(f"embedding has layout {weights.embedding.layout}, expected floats, blocks of ggml or groups")
    if weights.embedding.layout not in FLOATS and weights.embedding.activations != "a8_g32":
        raise ValueError(f"embedding has activations {weights.embedding.activations!r}, expected a8_g32")
    if weights.head is not None:
        _check_linear("head", weights.head, (s.vocab_size, s.hidden_size))
    _check_norm("final_norm", weights.final_norm, s.hidden_size)
    for i, layer in enumerate(weights.layers):
        for name, shape in linears.items():
            _check_linear(f"layers[{i}].{name}", getattr(layer, name), shape)
        for name, size in norms.items():
            _check_norm(f"layers[{i}].{name}", getattr(layer, name), size)
        if layer.adapter is not None:
            _check_linear(f"layers[{i}].adapter", layer.adapter, (s.hidden_size, s.hidden_size))
            if layer.adapter.layout not in FLOATS:
                raise ValueError(f"layers[{i}].adapter has layout {layer.adapter.layout}, expected floats")


def _check_linear(name: str, linear: LinearWeights, shape: tuple[int, int]) -> None:
    if linear.layout not in DTYPES:
        raise ValueError(f"{name} has layout {linear.layout!r}, expected one of {', '.join(DTYPES)}")
    if (linear.rows, linear.cols) != shape:
        raise ValueError(f"{name} has shape {[linear.rows, linear.cols]}, expected {list(shape)}")
    if linear.layout in BLOCKS and linear.cols % BLOCKS[linear.layout][0]:
        raise ValueError(
            f"{name} has {linear.cols} columns, but {linear.layout} has blocks of {BLOCKS[linear.layout][0]}"
        )
    expected = (np.dtype(DTYPES[linear.layout]), linear.data_shape())
    if (linear.data.dtype, linear.data.shape) != expected:
        raise ValueError(
            f"{name} has data {linear.data.dtype} {list(linear.data.shape)}, "
            f"expected {expected[0]} {list(expected[1])} for {linear.layout}"
        )
    if linear.bias is not None and (linear.bias.dtype, linear.bias.shape) != (np.float32, (linear.rows,)):
        raise ValueError(
            f"{name}.bias is {linear.bias.dtype} {list(linear.bias.shape)}, expected float32 [{linear.rows}]"
        )
    if linear.norm is not None:
        _check_norm(f"{name}.norm", linear.norm, linear.cols)
    if (linear.groups is not None) != (linear.layout == "grouped"):
        raise ValueError(f"{name} has layout {linear.layout} with{'out' if linear.groups is None else ''} groups")
    if linear.inputs is not None and linear.activations != "a8_g32":
        raise ValueError(f"{name} has a grid of inputs, but {linear.layout} with {linear.activations} takes none")
    allowed = _activations(linear.layout)
    if linear.activations not in allowed:
        raise ValueError(f"{name} has activations {linear.activations!r}, expected {' or '.join(map(str, allowed))}")


def _activations(layout: str) -> tuple[str | None, ...]:
    if layout in FLOATS:
        return (None,)
    if layout == "grouped" or layout in BLOCKS:
        return ("a8", "a8_q128", "a8_g32") if layout in TERNARY_BLOCKS else ("a8_g32",)
    return ("a8", "a8_q128")


def _check_norm(name: str, norm: NDArray | None, size: int | None) -> None:
    if norm is None or size is None:
        if norm is not None or size is not None:
            found, expected = ("missing", "present") if norm is None else ("present", "none")
            raise ValueError(f"{name} is {found}, expected {expected}")
    elif (norm.dtype, norm.shape) != (np.float32, (size,)):
        raise ValueError(f"{name} is {norm.dtype} {list(norm.shape)}, expected float32 [{size}]")

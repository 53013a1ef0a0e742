"""ggml's own quantisers, those inside llama-cpp-python."""

import ctypes
import functools
import importlib.util
from pathlib import Path

import numpy as np

from tritkit.gguf_model import ggml_name
from tritkit.layouts import GGML
from tritkit.models.shapes import matrix_names, matrix_shape

SPEC = importlib.util.find_spec("llama_cpp")
if SPEC is None or SPEC.origin is None:
    raise ModuleNotFoundError("llama-cpp-python is not installed")
TYPES = {"q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13}
TYPES |= {"q6_k": 14, "tq1_0": 34, "tq2_0": 35}


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """libNAME of llama-cpp-python."""
    (path,) = (Path(SPEC.origin).parent / "lib").glob(f"lib{name}.so")
    return ctypes.CDLL(str(path))


def quantize_chunk(name: str, w: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """uint8 [rows, row bytes] of float32 [rows, columns]."""
    chunk = library("ggml-base").ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    out = np.zeros((len(w), GGML[name].row_bytes(w.shape[1])), np.uint8)
    assert w.dtype == np.float32 and w.flags.c_contiguous
    weights = None if importance is None else importance.ctypes.data
    assert chunk(TYPES[name], w.ctypes.data, out.ctypes.data, 0, *w.shape, weights) == out.size
    return out


class _Shape(ctypes.Structure):
    _fields_ = [("architecture", ctypes.c_char_p)] + [
        (name, ctypes.c_uint32)
        for name in ("hidden", "intermediate", "layers", "heads", "kv_heads", "experts", "key_length", "value_length")
    ]


class _Arena(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def mix_types(config, file_type: int, architecture: str) -> dict[str, str]:
    """The type of every matrix in a mix without importance, by llama.cpp's own rules for a model of these sizes."""
    import llama_cpp

    ggml, llama, pointer = library("ggml-base"), library("llama"), ctypes.c_void_p
    ggml.ggml_init.restype, ggml.ggml_init.argtypes = pointer, [_Arena]
    ggml.ggml_new_tensor_2d.restype = pointer
    ggml.ggml_new_tensor_2d.argtypes = [pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    ggml.ggml_set_name.argtypes, ggml.ggml_free.argtypes = [pointer, ctypes.c_char_p], [pointer]
    new_model = llama._Z31llama_quant_model_from_metadataPK22llama_quant_model_desc
    new_state = llama._Z16llama_quant_initPK11llama_modelPK27llama_model_quantize_params
    compute = llama._Z25llama_quant_compute_typesP19quantize_state_impl11llama_ftypePP11ggml_tensorP9ggml_typem
    free_state = llama._Z16llama_quant_freeP19quantize_state_impl
    new_model.restype = new_state.restype = pointer
    new_state.argtypes, free_state.argtypes = [pointer, pointer], [pointer]
    compute.argtypes = [pointer, ctypes.c_int, pointer, pointer, ctypes.c_size_t]
    c = config
    sizes = (c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads)
    shape = _Shape(architecture.encode(), *sizes, 0, c.head_dim, c.head_dim)
    names = matrix_names(config)
    context = ggml.ggml_init(_Arena(len(names) * 1024 + 4096, None, True))
    params = llama_cpp.llama_model_quantize_default_params()
    model = new_model(ctypes.byref(shape))
    state = new_state(model, ctypes.byref(params))
    try:
        tensors = (pointer * len(names))()
        for i, name in enumerate(names):
            rows, columns = matrix_shape(config, name)
            tensors[i] = ggml.ggml_new_tensor_2d(context, 0, columns, rows)
            ggml.ggml_set_name(tensors[i], ggml_name(f"{name}.weight").encode())
        found = (ctypes.c_int * len(names))()
        compute(state, file_type, tensors, found, len(names))
    finally:
        free_state(state)
        llama_cpp.llama_model_free(model)
        ggml.ggml_free(context)
    known = {number: name for name, number in TYPES.items()} | {1: "f16"}
    return {name: known[number] for name, number in zip(names, found, strict=True)}


def quantize_file(source, out, file_type: int, importance: dict[str, np.ndarray] | None = None, pure=False) -> None:
    """llama-quantize: a GGUF file of floats to a file of a mix. importance: float32 by names of tensors."""
    import llama_cpp
    from llama_cpp_peer import quiet

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = file_type, 2, pure
    if importance is not None:

        class Entry(ctypes.Structure):
            _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]

        arrays = {name.encode(): np.ascontiguousarray(a, np.float32) for name, a in importance.items()}
        entries = (Entry * (len(arrays) + 1))()
        for i, (name, a) in enumerate(arrays.items()):
            entries[i] = Entry(name, a.ctypes.data, a.size)
        params.imatrix = ctypes.cast(entries, type(params.imatrix))
    with quiet():
        failed = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params))
    assert not failed


class _Tensor(ctypes.Structure):
    """struct ggml_tensor of ggml.h."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("columns", ctypes.c_int64),
    ("more_sizes", ctypes.c_int64 * 3),
    ("strides", ctypes.c_size_t * 4),
    ("operation", ctypes.c_int),
    ("parameters", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("sources", ctypes.POINTER(_Tensor) * 10),
    ("view", ctypes.c_void_p),
    ("view_offset", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


def squares_of_inputs(path, sequences: np.ndarray) -> dict[str, np.ndarray]:
    """What llama-imatrix collects: sums of x^2 of the inputs of each matrix of the layers, float64 by GGUF's names, as
    llama.cpp itself runs the sequences, int [n, length]."""
    import llama_cpp
    from llama_cpp_peer import quiet

    name_of = library("ggml-base").ggml_op_name
    name_of.restype, found = ctypes.c_char_p, {}

    @llama_cpp.ggml_backend_sched_eval_callback
    def watch(tensor, ask, _):
        tensor = ctypes.cast(tensor, ctypes.POINTER(_Tensor)).contents
        if name_of(tensor.operation) != b"MUL_MAT" or not tensor.sources[0].contents.name.startswith(b"blk."):
            return not ask
        if not ask:
            x = tensor.sources[1].contents
            assert x.type == 0 and x.strides[1] == 4 * x.columns and x.more_sizes[1] == 1
            rows = (ctypes.c_float * (x.columns * x.more_sizes[0])).from_address(x.data)
            squares = (np.ctypeslib.as_array(rows).reshape(-1, x.columns).astype(np.float64) ** 2).sum(0)
            name = tensor.sources[0].contents.name.decode()
            found[name] = found.get(name, 0) + squares
        return True

    with quiet():
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        length = sequences.shape[1]
        params.n_ctx = params.n_batch = params.n_ubatch = length
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.cb_eval = watch
        context = llama_cpp.llama_init_from_model(model, params)
        batch = llama_cpp.llama_batch_init(length, 0, 1)
        for tokens in sequences.tolist():
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            batch.n_tokens = length
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
                batch.logits[i] = 1  # else the last layer is computed for the last token alone
            assert llama_cpp.llama_decode(context, batch) == 0
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
    return found

"""The table in docs/containers.md, made here: each yes is what has just been done with a small model.

TRITKIT_WRITE_TABLE=1 pytest tests/test_containers.py      writes it
"""

import os
from pathlib import Path

import pytest
from integer_folder import integer_folder

from tritkit.checkpoint import open_folder
from tritkit.difference import DIFFERENT, EQUAL, MISSING, differences
from tritkit.gguf import GGUFFile
from tritkit.gguf_export import export_gguf
from tritkit.gguf_model import open_gguf
from tritkit.hf_export import export_hf
from tritkit.importer import import_model
from tritkit.layouts.search import SEARCHES
from tritkit.models.shapes import linear_names
from tritkit.pack import pack

DOCS = Path(__file__).parent.parent / "docs" / "containers.md"
WIDE = {"hidden_size": 256, "intermediate_size": 512}
FOREIGN = (
    ("gptq", "GPTQ folder, version 1", "symmetric 2, 3, 4, 8 bits in groups", "GPTQModel",
     ("int2_g16", "int3_g32", "int4_g64", "int8_g32")),
    ("gptq_v2", "GPTQ folder, version 2", "2, 3, 4, 8 bits in groups", "GPTQModel",
     ("int2_g16_asym", "int3_g32", "int4_g64_asym", "int8_g32")),
    ("compressed-tensors", "compressed-tensors folder", "`pack-quantized`, 2 to 8 bits",
     "compressed-tensors, transformers", ("int2_g16_asym", "int3_g32", "int4_row", "int6_g64_asym", "int8_row")),
)  # fmt: skip
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"


def is_same(a, b, only=None):
    """Whether two models are equal, or their linears equal but for the rounding of scales."""
    found = {d.name: d.status for d in differences(a, b)}
    if only is None:
        return set(found.values()) == {EQUAL}
    return not {found[f"{name}.weight"] for name in only} & {DIFFERENT, MISSING}


def same_codes(a, b):
    return all((a.codes(n).codes == b.codes(n).codes).all() for n in linear_names(a.config))


def yes(done: bool) -> str:
    return "yes" if done else "no"


@pytest.fixture
def rows(make_folder, tmp_path):
    """container | layout | read | write | exact | proven by"""
    found = []
    full = open_folder(make_folder("llama", **WIDE))
    latent = open_folder(make_folder("b158", **WIDE))
    pack(latent.path, tmp_path / "packed", "float32")
    packed = open_folder(tmp_path / "packed")
    binary = make_folder("b1", **WIDE)

    def row(container, layout, read, write, exact, proof):
        found.append((container, layout, read, write, exact, proof))

    for to, same in (("float32", is_same), ("float16", None), ("bf16", None)):
        export_hf(full, tmp_path / to, to)
        back = open_folder(tmp_path / to)
        exact = yes(is_same(full, back)) if same else "rounded" * is_same(full, back, linear_names(full.config))
        row("Hugging Face folder", to.replace("bf16", "bfloat16"), yes(True), yes(True), exact, "transformers")
    for to in ("hf-bitlinear", "hf-autobitlinear"):
        export_hf(packed, tmp_path / to, to)
        back = open_folder(tmp_path / to)
        name = to.replace("-", "_")
        assert set(back.layouts.values()) == {name}
        row("Hugging Face folder", f"`{name}`", yes(True), yes(True), yes(same_codes(packed, back)), "transformers")
    import_model(latent.path, tmp_path / "online")
    exact = yes(is_same(latent, open_folder(tmp_path / "online")))
    row("Hugging Face folder", "autobitlinear online (latent)", yes(True), yes(True), exact, "transformers")
    pack(binary, tmp_path / "binary")
    import_model(tmp_path / "binary", tmp_path / "binary-2")
    exact = yes(is_same(open_folder(tmp_path / "binary"), open_folder(tmp_path / "binary-2")))
    row("tritkit folder", "`binary_rows`", yes(True), yes(True), exact, "transformers after `import tritkit`")

    for kind, formats in {
        "`dense`, int2 to int8": ("int2_g16", "int3_g32_asym", "int5_row", "int8_tensor"),
        "`nf4`, `nf4_dq`, `fp4`": ("nf4", "nf4_dq", "fp4"),
    }.items():
        exact = [True]
        for format in formats:
            folder = open_folder(integer_folder(full.path, tmp_path / format, format))
            import_model(folder.path, tmp_path / f"{format}-2")
            exact.append(is_same(folder, open_folder(tmp_path / f"{format}-2")))
        proof = "bitsandbytes (nf4)" if "nf4" in kind else "`test_layouts.py`"
        row("tritkit folder", kind, yes(True), yes(True), yes(all(exact)), proof)
    for to, name, layout, proof, formats in FOREIGN:
        exact = [True]
        for format in formats:
            folder = open_folder(integer_folder(full.path, tmp_path / f"{to}-{format}-0", format))
            export_hf(folder, tmp_path / f"{to}-{format}", to)
            back = open_folder(tmp_path / f"{to}-{format}")
            import_model(back.path, tmp_path / f"{to}-{format}-2")
            exact.append(is_same(folder, back) and is_same(back, open_folder(tmp_path / f"{to}-{format}-2")))
        row(name, layout, yes(True), yes(True), yes(all(exact)), proof)

    export_gguf(full, tmp_path / "f32.gguf", "f32")
    rounding = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4")
    for kind in ("f32", "f16", "bf16", *rounding, "q6_k", "q5_k", "q4_k", "q3_k", "q2_k"):
        path = tmp_path / f"{kind}.gguf"
        export_gguf(full, path, kind, overwrite=True, pure=kind in SEARCHES)
        opened = open_gguf(path)
        import_model(path, tmp_path / f"{kind}-folder")
        exact = yes(is_same(opened, open_folder(tmp_path / f"{kind}-folder")))
        export_gguf(open_folder(tmp_path / f"{kind}-folder"), tmp_path / f"{kind}-2.gguf")
        first, second = GGUFFile(path), GGUFFile(tmp_path / f"{kind}-2.gguf")
        assert all(first[n].data.tobytes() == second[n].data.tobytes() for n in first)
        proof = {"f32": "llama.cpp", "mxfp4": "gguf"}.get(kind, "llama.cpp, gguf")
        row("GGUF", kind.upper(), yes(True), yes(True), exact, proof)
    for kind in ("tq1_0", "tq2_0", "i2_s"):
        for arm in (False, True) if kind == "i2_s" else (False,):
            path = tmp_path / f"{kind}{arm}.gguf"
            export_gguf(packed, path, kind, i2_s="arm" if arm else None)
            back = open_gguf(path, "arm" if arm else "x86")
            exact = yes(same_codes(packed, back) and is_same(packed, back, linear_names(packed.config)))
            proof = "llama.cpp, gguf" if kind != "i2_s" else "byte check against bitnet.cpp's source"
            name = kind.upper() + ({True: ", ARM order", False: ", x86 order"}[arm] if kind == "i2_s" else "")
            row("GGUF", name, yes(True), yes(True), exact, proof)
    row("GGUF", "IQ1 ... IQ4, NVFP4, Q1_0", "refused", "no", "-", "")
    row("llama2.c checkpoint", "float32", yes(True), "no", "yes", "llama.cpp, through GGUF")
    row("pickles", "", "refused", "no", "-", "")
    return found


def test_the_table_in_the_docs_is_what_was_done(rows):
    header = ("container", "layout", "read", "write", "exact", "proven by")
    lines = [header, ("---",) * len(header), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    assert "no |" not in "\n".join(f"{r[4]} |" for r in rows)  # whatever can be written and read comes back
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = f"{before}{BEGIN}\n{table}\n{END}{after}"
    if os.environ.get("TRITKIT_WRITE_TABLE"):
        DOCS.write_text(wanted, encoding="utf-8")
    assert DOCS.read_text(encoding="utf-8") == wanted, "run TRITKIT_WRITE_TABLE=1 pytest tests/test_containers.py"


def test_llama2c_comes_exactly(shared_data, tmp_path):
    from tritkit.llama2c import open_llama2c

    source = shared_data / "stories260K"
    import_model(source / "stories260K.bin", tmp_path / "stories", tokenizer=source / "tok512.bin")
    assert is_same(open_llama2c(source / "stories260K.bin"), open_folder(tmp_path / "stories"))

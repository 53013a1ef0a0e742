"""The recipes of the table in docs/quantisation.md, a file for each row.

tritkit sweep MODEL $(python tools/table_recipes.py OUT) --calibration TEXT --data TEST --out sweep.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

MIXES = ("q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k")
RANGES = ("absmax", "percentile", "mse", "entropy")
TWIN = """
int8_g64_rtn int8_g64_gptq int4_g64_rtn int4_g64_gptq int4_g64_rtn_qwt int4_g64_gptq_qwt int4_row_rtn int4_row_gptq
int4_row_rtn_qwt int4_row_gptq_qwt int3_g64_rtn int3_g64_gptq int3_g64_rtn_qwt int3_g64_gptq_qwt int2_g64_rtn
int2_g64_gptq int2_g64_rtn_qwt int2_g64_gptq_qwt q4_0_search mix_q6_k mix_q5_k_m mix_q4_k_m mix_q4_k_m_imatrix
mix_q3_k_m mix_q3_k_m_imatrix mix_q2_k mix_q2_k_imatrix nf4 llm_int8 w8a8_dynamic w8a8_static_absmax
w8a8_static_percentile w8a8_static_mse w8a8_static_entropy bits_3.5 bits_3.5_gptq ternary_rtn w4a8_rtn w4a8_rtn_qwt
w4a8_gptq w4a8_gptq_qwt w4a4_rtn w4a4_rtn_qwt w4a4_gptq w4a4_gptq_qwt
""".split()  # noqa: SIM905  the rows that are measured on the full-precision twin too
SEARCH = {8: "q8_0", 5: "q5_0", 4: "q4_0"}  # those that SmolLM2's rows of 576 can be cut into


def rows() -> dict[str, str]:
    """TOML by name, in the order of the table."""
    found = {}
    for bits in (8, 6, 5, 4, 3, 2):
        for group in ("g64", "row"):
            format = f'format = "int{bits}_{group}"\n'
            for method in ("rtn", "gptq"):
                found[f"int{bits}_{group}_{method}"] = f'{format}method = "{method}"\n'
                found[f"int{bits}_{group}_{method}_qwt"] = f'{format}method = "{method}"\ncorrect = "qwt"\n'
        if bits in SEARCH:
            found[f"{SEARCH[bits]}_search"] = f'format = "{SEARCH[bits]}"\nmethod = "search"\n'
            found[f"{SEARCH[bits]}_search_qwt"] = f'format = "{SEARCH[bits]}"\nmethod = "search"\ncorrect = "qwt"\n'
    found |= {f"mix_{mix}": f'mix = "{mix}"\nimportance = false\n' for mix in MIXES}
    found |= {f"mix_{mix}_imatrix": f'mix = "{mix}"\n' for mix in ("q4_k_m", "q3_k_m", "q2_k")}
    found |= {name: f'format = "{name}"\n' for name in ("nf4", "nf4_dq", "fp4")}
    found["q4_1_search"] = 'format = "q4_1"\nexact = true\n'
    found["int4_g32_asym_rtn"] = 'format = "int4_g32_asym"\n'
    found["llm_int8"] = 'format = "int8_row"\ninputs = "int8_row+outliers"\n'
    found["w8a8_dynamic"] = 'format = "int8_row"\ninputs = "int8_row"\n'
    for method in RANGES:
        found[f"w8a8_static_{method}"] = f'format = "int8_row"\ninputs = "int8_tensor"\ninputs_range = "{method}"\n'
    found["w8a8_static_mse_smoothquant"] = found["w8a8_static_mse"] + 'transform = "smoothquant"\n'
    for bits in (8, 4):
        weights = f'format = "int4_g64"\ninputs = "int{bits}_row"\n'
        for method in ("rtn", "gptq"):
            found[f"w4a{bits}_{method}"] = f'{weights}method = "{method}"\n'
            found[f"w4a{bits}_{method}_qwt"] = f'{weights}method = "{method}"\ncorrect = "qwt"\n'
    found |= same_size(1.5)
    found["int4_g64_awq"] = 'format = "int4_g64"\ntransform = "awq"\n'
    found["bits_3.5"] = "[budget]\nbits = 3.5\n"
    found["bits_3.5_gptq"] = 'method = "gptq"\n[budget]\nbits = 3.5\n'
    found["ternary_rtn"] = 'format = "ternary"\n'
    return found


def same_size(terms: float) -> dict[str, str]:
    """Rows as large as those of 3 and 4 bits in groups of 64 with QwT, whose terms take so many bits a weight, with
    these spent on the weights themselves."""
    found = {}
    for bits, inputs in ((3.25, ""), (4.25, ""), (4.25, "a8"), (4.25, "a4")):
        total = round(bits + terms, 2)
        name = f"bits_{total}" + f"_{inputs}" * bool(inputs)
        rounded = f'inputs = "int{inputs[1]}_row"\n' if inputs else ""
        for method in ("rtn", "gptq"):
            found[f"{name}_{method}"] = f'{rounded}method = "{method}"\n[budget]\nbits = {total}\n'
    return found


def twin_rows() -> dict[str, str]:
    """Those of the full-precision twin, whose terms of QwT take 1.78 bits a weight."""
    ruins = {f"{name}_gptq": f'format = "{name}"\nmethod = "gptq"\n' for name in ("ternary", "binary")}
    return {name: text for name, text in rows().items() if name in TWIN} | ruins | same_size(1.78)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the recipes")
    parser.add_argument("--twin", action="store_true", help="only the rows of the table on the full-precision twin")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, text in (twin_rows() if options.twin else rows()).items():
        path = options.out / f"{name}.toml"
        path.write_text(f'name = "{name}"\n{text}')
        print(path)  # for the command line of a sweep, in the order of the table


if __name__ == "__main__":
    main()

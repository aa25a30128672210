"""Write docs/planted_bugs.md from the catalogue: ``python tests/mutants/write_table.py``."""

from __future__ import annotations

from pathlib import Path

import bench_bugs
import bound_bugs
import catalogue
import compiled_bugs
import cupy_decode_bugs
import cupy_gemm_bugs
import cupy_kernel_bugs
import cupy_upload_bugs
import decoder
import decoding
import fast_attention_bugs
import fast_gemm_bugs
import fast_pointwise_bugs
import numpy_bodies
import verify_check_bugs
import verify_diagnose_bugs
import verify_recorders_bugs
import verify_report_bugs

PAGE = Path(__file__).parents[2] / "docs" / "planted_bugs.md"
SUBJECTS = {
    "Projection, norm, bounds, configs and checkpoints": catalogue.MUTANTS,
    "Decoder": decoder.MUTANTS,
    "NumPy's own bodies": numpy_bodies.MUTANTS,
    "Sampling and generation": decoding.MUTANTS,
    "Compiled bodies": compiled_bugs.MUTANTS,
    "Compiled product of many tokens": fast_gemm_bugs.MUTANTS,
    "Compiled attention of many queries": fast_attention_bugs.MUTANTS,
    "Compiled norm, RoPE and gate of many tokens": fast_pointwise_bugs.MUTANTS,
    "Products, attention and RoPE on a GPU": cupy_gemm_bugs.MUTANTS,
    "Kernels of decoding on a GPU": cupy_kernel_bugs.MUTANTS,
    "Decoding and generation on a GPU": cupy_decode_bugs.MUTANTS,
    "Uploads to a GPU": cupy_upload_bugs.MUTANTS,
    "Bounds of a layer's operations": bound_bugs.MUTANTS,
    "Checks, traces and commands": verify_check_bugs.MUTANTS,
    "Diagnosis": verify_diagnose_bugs.MUTANTS,
    "Names, files and recorders": verify_recorders_bugs.MUTANTS,
    "Reports and comparisons": verify_report_bugs.MUTANTS,
    "Benchmarks": bench_bugs.MUTANTS,
}
MUTANTS = [mutant for mutants in SUBJECTS.values() for mutant in mutants]
HEAD = """\
# Planted bugs

Each line is a mistake that can be made on purpose in a copy of the package, and the test that was
written for it. `pytest -n auto tests/mutants` makes all {count}, one at a time, and fails unless
each makes an assertion of its test fail; without any of them all of these tests pass. Where there
is a GPU, `pytest -m gpu tests/mutants` makes those that CuPy's arrays can show, with such arrays.
"""


def page():
    """The whole page."""
    lines = [HEAD.format(count=len(MUTANTS))]
    for subject, mutants in SUBJECTS.items():
        lines += [f"\n## {subject}\n\n", "| Bug | In | Found by |\n", "| --- | --- | --- |\n"]
        for mutant in mutants:
            file, _, test = mutant.killed_by.partition("::")
            lines.append(f"| {mutant.name} | `{mutant.file}` | `{file}`: `{test}` |\n")
    return "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""Bugs to plant in the compiled product of many tokens."""

from __future__ import annotations

from catalogue import Mutant

GEMM = "backends/numpy/fast/gemm.py"
TESTS = "test_fast_gemm.py"

MUTANTS = [
    Mutant(
        "every block of K begins from the bias",
        GEMM,
        "if block == 0:",
        "if block >= 0:",
        f"{TESTS}::test_within_bound_of_naive_sums[float32-bfloat16]",
    ),
    Mutant(
        "the last number of an odd K dropped",
        GEMM,
        "depth = (left + 1) // 2 if form == PAIRS else left",
        "depth = left // 2 if form == PAIRS else left",
        f"{TESTS}::test_within_bound_of_naive_sums[bfloat16-bfloat16]",
    ),
    Mutant(
        "rows beyond the last read, though not used",
        GEMM,
        'builder.icmp_signed("<", last, _integer(r))',
        'builder.icmp_signed("<", last, _integer(0))',
        f"{TESTS}::test_reads_nothing_beyond_the_weight[float32-float16]",
    ),
    Mutant(
        "ties rounded away from zero",
        GEMM,
        "np.uint32(0x7FFF) + even",
        "np.uint32(0x8000)",
        f"{TESTS}::test_results_are_rounded_to_bfloat16",
    ),
    Mutant(
        "columns of a tile's second vector those of the first",
        GEMM,
        "(token, columns[v], total)",
        "(token, columns[0], total)",
        f"{TESTS}::test_a_token_does_not_depend_on_its_neighbours_or_on_threads[float32-float32]",
    ),
]

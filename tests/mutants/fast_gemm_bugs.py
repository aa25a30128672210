"""Bugs to plant in the compiled product of many tokens, and in the memory of its results."""

from __future__ import annotations

from catalogue import Mutant

GEMM = "backends/numpy/fast/gemm.py"
PANELS = "backends/numpy/fast/panels.py"
TILES = "backends/numpy/fast/tiles.py"
LINEAR = "backends/numpy/fast/linear.py"
MEMORY = "backends/numpy/memory.py"
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
        "units = (left + 1) // 2 if form == PAIRS else left",
        "units = left // 2 if form == PAIRS else left",
        f"{TESTS}::test_within_bound_of_naive_sums[bfloat16-bfloat16]",
    ),
    Mutant(
        "rows beyond the last read, though not used",
        TILES,
        'builder.icmp_signed("<", last, _integer(r))',
        'builder.icmp_signed("<", last, _integer(0))',
        f"{TESTS}::test_reads_nothing_beyond_the_weight[own-float32-float16]",
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
        TILES,
        "(token, columns[v], total)",
        "(token, columns[0], total)",
        f"{TESTS}::test_a_token_does_not_depend_on_its_neighbours_or_on_threads[float32-float32]",
    ),
    Mutant(
        "the last group of a chunk not packed",
        GEMM,
        "min(chunk * CHUNK + CHUNK, groups)",
        "min(chunk * CHUNK + CHUNK, groups) - 1",
        f"{TESTS}::test_within_bound_of_naive_sums[float32-float32]",
    ),
    Mutant(
        "x multiplied before other threads have packed it",
        GEMM,
        "until(finished, chunks, finished + 8)",
        "until(finished, 0, finished + 8)",
        f"{TESTS}::test_a_thread_waits_for_what_others_pack",
    ),
    Mutant(
        "half of a last tile of two groups left out",
        PANELS,
        "elif left == 2:",
        "elif left == GROUPS:",
        f"{TESTS}::test_within_bound_of_naive_sums[float32-float32]",
    ),
    Mutant(
        "tokens of a later part written over the first",
        GEMM,
        "token, end = start * GROUP,",
        "token, end = 0 * GROUP,",
        f"{TESTS}::test_more_tokens_than_pass_a_panel",
    ),
    Mutant(
        "two tokens of a group swapped in packing",
        TILES,
        "half + i // 2 + LANES * (i % 2)",
        "half + i // 2 + LANES * (1 - i % 2)",
        f"{TESTS}::test_within_bound_of_naive_sums[float32-float32]",
    ),
    Mutant(
        "units left over by the steps of a tile not added",
        TILES,
        "if STEP > 1:",
        "if STEP > 4:",
        f"{TESTS}::test_reads_nothing_beyond_the_weight[avx2-float32-float32]",
    ),
    Mutant(
        "numbers left over in a row read as if there were a vector of them",
        TILES,
        'builder.icmp_signed(">=", count, _integer(lanes.count))',
        'builder.icmp_signed(">=", count, _integer(0))',
        f"{TESTS}::test_reads_nothing_beyond_the_weight[avx2-float32-float16]",
    ),
    Mutant(
        "many tokens in float32 left to BLAS, which writes them side by side",
        LINEAR,
        "    return gemm.problem(dtype_name(x.dtype), dtype_name(weight.dtype)) is None",
        "    return kind != FLOAT32",
        f"{TESTS}::test_numbers_of_a_token_are_adjacent",
    ),
    Mutant(
        "memory used again while an array has it",
        MEMORY,
        "_spare[size].pop()",
        "_spare[size][-1]",
        "test_memory.py::test_arrays_that_are_alive_keep_their_numbers",
    ),
    Mutant(
        "memory never used again",
        MEMORY,
        "np.asarray(_Block(memory))",
        "memory",
        "test_memory.py::test_memory_is_used_again_when_the_last_view_is_gone",
    ),
    Mutant(
        "all memory kept",
        MEMORY,
        "len(blocks := spare[self._memory.size]) < SPARE",
        "(blocks := spare[self._memory.size]) is not None",
        "test_memory.py::test_only_so_much_is_kept",
    ),
]

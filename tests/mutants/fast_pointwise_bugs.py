"""Bugs to plant in the compiled norm, RoPE and gate of many tokens."""

from __future__ import annotations

from catalogue import Mutant

ELEMENTS = "backends/numpy/fast/elements.py"
POINTWISE = "backends/numpy/fast/pointwise.py"

MUTANTS = [
    Mutant(
        "rows that the last thread leaves out",
        ELEMENTS,
        "count * (thread + 1) // team",
        "count // team * (thread + 1)",
        "test_fast_pointwise.py::test_threads_share_all_of_it",
    ),
    Mutant(
        "a compiled norm without eps",
        ELEMENTS,
        "root = np.sqrt(mean + eps)",
        "root = np.sqrt(mean)",
        "test_fast_pointwise.py::test_threads_share_all_of_it",
    ),
    Mutant(
        "compiled angles of the first sequence for all",
        ELEMENTS,
        "own = b % cos.shape[0]",
        "own = 0",
        "test_fast_pointwise.py::test_threads_share_all_of_it",
    ),
    Mutant(
        "compiled RoPE the other way round",
        ELEMENTS,
        "y[i] = a * cos[i] - b * sin[i]",
        "y[i] = a * cos[i] + b * sin[i]",
        "test_fast_pointwise.py::test_threads_share_all_of_it",
    ),
    Mutant(
        "heads that are no neighbours in memory read as if they were",
        POINTWISE,
        "steps = np.array(x.strides[:3])",
        "steps = np.array(y.strides[:3])",
        "test_fast_pointwise.py::test_threads_share_all_of_it",
    ),
    Mutant(
        "interleaved pairs turned as halves",
        POINTWISE,
        'if layout != "half" or small',
        "if small",
        "test_fast_pointwise.py::test_what_the_kernels_do_not_take",
    ),
]

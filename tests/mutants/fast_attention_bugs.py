"""Bugs to plant in the compiled attention of many queries."""

from __future__ import annotations

from catalogue import Mutant

CALL = "backends/numpy/fast/attention.py"
TILED = "backends/numpy/fast/tiled_attention.py"
TESTS = "test_fast_attention.py"
BOUND = f"{TESTS}::test_within_the_bound"

MUTANTS = [
    Mutant(
        "a window wider by one in a kernel",
        TILED,
        "(slot > own - window)",
        "(slot >= own - window)",
        BOUND,
    ),
    Mutant(
        "keys that are not there yet seen in a kernel",
        TILED,
        "(slot >= 0) & (slot <= own)",
        "(slot <= own)",
        BOUND,
    ),
    Mutant(
        "padding seen in a kernel",
        TILED,
        "row[j] &= keep[batch % keep.shape[0], begin + j]",
        "row[j] &= np.uint8(1)",
        BOUND,
    ),
    Mutant(
        "a mask of all sequences taken for that of the first",
        TILED,
        "allowed[\n                    batch % allowed.shape[0], first",
        "allowed[\n                    0, first",
        BOUND,
    ),
    Mutant(
        "panels of keys looked at only if the last query of a block sees them",
        TILED,
        "found |= row[j]",
        "found = row[j] if j else row[0]",
        BOUND,
    ),
    Mutant(
        "weights not divided by their sum in a kernel",
        TILED,
        "sums[d // COLUMNS, row, d % COLUMNS] / total",
        "sums[d // COLUMNS, row, d % COLUMNS]",
        BOUND,
    ),
    Mutant(
        "rows that see nothing divided by zero",
        TILED,
        "totals[row] if totals[row] != 0 else np.float32(1)",
        "totals[row]",
        BOUND,
    ),
    Mutant(
        "weighed values of the first panels forgotten",
        TILED,
        "(sums[c].ctypes.data, row) if begun",
        "(sums[c].ctypes.data, row) if not begun",
        f"{TESTS}::test_blocks_of_the_real_size",
    ),
    Mutant(
        "a head's queries read where another's are",
        TILED,
        "token + g * places[0, 3]",
        "token + (group - 1 - g) * places[0, 3]",
        BOUND,
    ),
    Mutant(
        "minus infinity taken off minus infinity in rows that see nothing",
        TILED,
        "np.float32(0) if masked and shift == nothing else shift",
        "shift",
        BOUND,
    ),
    Mutant(
        "numbers in another order read as if a head's were adjacent",
        CALL,
        "readable(a) == FLOAT32 and a.strides[3] == 4",
        "readable(a) == FLOAT32",
        f"{TESTS}::test_what_goes_to_numpy",
    ),
    Mutant(
        "the scale of the scores left out in a kernel",
        TILED,
        "score = scores[i] * scale if",
        "score = scores[i] if",
        f"{TESTS}::test_scale",
    ),
]

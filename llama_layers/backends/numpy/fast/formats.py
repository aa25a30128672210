"""What the compiled kernels and their callers agree on."""

from __future__ import annotations

FLOAT32, BFLOAT16, FLOAT16 = range(3)
PAIRS = 3  # of bfloat16, as the product of many tokens takes them
KINDS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16}
ROWS = 4  # of weights that are multiplied at once: a matrix has as many at least
CHUNK = 256  # keys that one unit of attention takes
MOST = 16  # tokens: with more, the operations are the limit, and BLAS is at it

"""Bugs to plant in the kernels of decoding, and in what chooses among them."""

from __future__ import annotations

from catalogue import Mutant

LAUNCH = "backends/cupy/launch.py"
LINEAR = "backends/cupy/linear.py"
GEMV = "backends/cupy/kernels/gemv.cu"
NORM = "backends/cupy/kernels/norm.cu"
ROPE = "backends/cupy/kernels/rope_cache.cu"
ATTEND = "backends/cupy/kernels/attend.cu"
TOKENS = "backends/cupy/kernels/tokens.cu"

ROWS = "gpu/test_gemv.py::test_a_row_does_not_depend_on_the_others"
TAKEN = "gpu/test_gemv.py::test_which_products_the_kernel_takes"
WIDTHS = "gpu/test_norm_cupy.py::test_every_width"
STEPS = "gpu/test_decode.py"
CHOICES = "gpu/test_tokens.py"
DRAWN = "gpu/test_drawn_tokens.py"

MUTANTS = [
    Mutant(
        "more than four rows summed from right to left",
        GEMV,
        "for (int part = 0; part < COUNT; part += PART)",
        "for (int part = COUNT - PART; part >= 0; part -= PART)",
        f"{ROWS}[stand-in-256-bfloat16]",
    ),
    Mutant(
        "the same numbers of a weight asked for again",
        GEMV,
        "read_rows(rows, first + STEP + lane, columns, next);",
        "read_rows(rows, first + lane, columns, next);",
        f"{ROWS}[stand-in-4200-float32]",
    ),
    Mutant(
        "a bfloat16 with the bits of the one beside it",
        "backends/cupy/kernels/common.cuh",
        "__uint_as_float(pair & 0xffff0000)",
        "__uint_as_float(pair)",
        f"{ROWS}[stand-in-256-bfloat16]",
    ),
    Mutant(
        "the last row of a weight left out",
        GEMV,
        "if (first + r >= outputs) break;",
        "if (first + r >= outputs - 1) break;",
        f"{ROWS}[stand-in-40-float32]",
    ),
    Mutant(
        "a residual that is not added",
        GEMV,
        "      if (residual) sum += widened(residual[at]);\n",
        "",
        f"{STEPS}::test_random_models[stand-in-gqa-float32]",
    ),
    Mutant(
        "gate and up the wrong way round in a kernel",
        GEMV,
        "(r % 2 ? up : gate)",
        "(r % 2 ? gate : up)",
        f"{STEPS}::test_random_models[stand-in-gqa-float32]",
    ),
    Mutant(
        "products of a few rows left to cuBLAS",
        LINEAR,
        "return launch.takes_gemv(x, weight, x, bias)",
        "return False",
        TAKEN,
    ),
    Mutant(
        "more rows than the kernel is for",
        LAUNCH,
        "0 < x.shape[0] <= MOST_TOKENS",
        "0 < x.shape[0] <= MOST_TOKENS + 1",
        TAKEN,
    ),
    Mutant(
        "loads of 16 bytes from rows that are no multiples of 16",
        LAUNCH,
        "count = math.gcd(columns, _LOAD // size)",
        "count = _LOAD // size",
        f"{WIDTHS}[stand-in-2049-float32]",
    ),
    Mutant(
        "loads of 16 bytes from any address",
        LAUNCH,
        "return math.gcd(count * size, *(array.data.ptr for array in arrays)) // size",
        "return count",
        "gpu/test_norm_cupy.py::test_addresses_that_are_no_multiples_of_16_bytes",
    ),
    Mutant(
        "the root of a sum of squares",
        NORM,
        "sqrtf(squares / columns + eps)",
        "sqrtf(squares + eps)",
        f"{WIDTHS}[stand-in-520-float32]",
    ),
    Mutant(
        "no barrier before the sums of the warps are read",
        NORM,
        "  __syncthreads();\n",
        "",
        f"{WIDTHS}[stand-in-520-float32]",
    ),
    Mutant(
        "numbers beyond the first of each thread left out",
        NORM,
        "sum = fmaf(wide(own[i].of[j]), wide(own[i].of[j]), sum);",
        "if (i == 0) sum = fmaf(wide(own[i].of[j]), wide(own[i].of[j]), sum);",
        f"{WIDTHS}[stand-in-9000-float32]",
    ),
    Mutant(
        "the ring of a cache never closed in a kernel",
        ROPE,
        "*length % capacity",
        "*length",
        f"{STEPS}::test_a_ring[stand-in-False]",
    ),
    Mutant(
        "turned the other way with the cache write",
        ROPE,
        "narrow(a * cos[angle] - b * sin[angle])",
        "narrow(a * cos[angle] + b * sin[angle])",
        f"{STEPS}::test_random_models[stand-in-gqa-float32]",
    ),
    Mutant(
        "values turned like keys",
        ROPE,
        "if (is_value) {",
        "if (false) {",
        f"{STEPS}::test_random_models[stand-in-gqa-float32]",
    ),
    Mutant(
        "a window one token too wide in a kernel",
        ATTEND,
        "length - slot < window",
        "length - slot <= window",
        f"{STEPS}::test_a_long_context[stand-in-window]",
    ),
    Mutant(
        "padding attended to by a kernel",
        ATTEND,
        "(!keep || keep[place])",
        "true",
        f"{STEPS}::test_a_ring[stand-in-True]",
    ),
    Mutant(
        "a piece of the context for each warp, and no more",
        ATTEND,
        "for (int i = warp; i < used; i += JOINING) {",
        "for (int i = warp; i < min(used, 4); i += JOINING) {",
        f"{STEPS}::test_a_long_context[stand-in-gqa]",
    ),
    Mutant(
        "pieces joined as if their largest scores were one",
        ATTEND,
        "any ? expf(end.x - largest) : 0",
        "any ? expf(0) : 0",
        f"{STEPS}::test_a_long_context[stand-in-gqa]",
    ),
    Mutant(
        "sums read of a piece in which nothing is seen",
        ATTEND,
        "if (any && c < WIDTH)",
        "if (c < WIDTH)",
        f"{STEPS}::test_a_long_context[stand-in-window]",
    ),
    Mutant(
        "no barrier before the weights of other warps are read",
        ATTEND,
        "  __syncthreads();\n\n  float weighed",
        "\n  float weighed",
        f"{STEPS}::test_widths_and_groups[stand-in-heads0-128]",
    ),
    Mutant(
        "half of a key's lanes left out of a score",
        ATTEND,
        "for (int bits = LANES / 2; bits; bits /= 2)",
        "for (int bits = LANES / 4; bits; bits /= 2)",
        f"{STEPS}::test_widths_and_groups[stand-in-heads0-128]",
    ),
    Mutant(
        "values of a warp's first key alone",
        ATTEND,
        "for (int bits = LANES; bits < 32; bits *= 2)",
        "for (int bits = LANES; bits < 1; bits *= 2)",
        f"{STEPS}::test_widths_and_groups[stand-in-heads0-16]",
    ),
    Mutant(
        "the last of the largest, over blocks of logits",
        TOKENS,
        "b.at < a.at",
        "b.at > a.at",
        f"{CHOICES}::test_argmax[stand-in-2049]",
    ),
    Mutant(
        "NaN passed over by a choice",
        TOKENS,
        "logit == logit ? Largest{logit, at} : Largest{__uint_as_float(0x7f800000), -1}",
        "Largest{logit, at}",
        f"{CHOICES}::test_argmax[stand-in-2049]",
    ),
    Mutant(
        "an infinite logit drawn",
        TOKENS,
        "largest.at < 0 || isinf(largest.value)",
        "largest.at < 0",
        f"{CHOICES}::test_no_token_of_nan_or_infinity[stand-in-0-inf]",
    ),
    Mutant(
        "tokens drawn from the first share of the logits",
        TOKENS,
        "share = i, reached = before;",
        "share = 0, reached = 0;",
        f"{CHOICES}::test_sample[stand-in-9001-30.0]",
    ),
    Mutant(
        "earlier warps' weights forgotten",
        TOKENS,
        "for (int i = 0; i < threadIdx.x / 32; ++i) sum += of_warps[i];",
        "",
        f"{CHOICES}::test_sample[stand-in-2049-30.0]",
    ),
    Mutant(
        "a rounding that leads beyond all tokens",
        TOKENS,
        "first < vocabulary ? first : last",
        "first",
        f"{CHOICES}::test_rounding_leads_to_the_last_token_with_a_weight",
    ),
    Mutant(
        "one number for all steps",
        TOKENS,
        "uniforms[static_cast<long long>(*step) * gridDim.x + blockIdx.x]",
        "uniforms[blockIdx.x]",
        f"{CHOICES}::test_sample[stand-in-2049-1.0]",
    ),
    Mutant(
        "sequences that stand still",
        TOKENS,
        "  if (i < sequences) rows[i] += 1;\n",
        "",
        f"{DRAWN}::test_the_definition_s_tokens[stand-in-gqa-{{}}-whole]",
    ),
]

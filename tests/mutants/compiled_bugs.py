"""Bugs to plant in the compiled kernels, and in what calls them."""

from __future__ import annotations

from catalogue import Mutant

KERNELS = "backends/numpy/fast/kernels.py"
ELEMENTS = "backends/numpy/fast/elements.py"
VECTORS = "backends/numpy/fast/vectors.py"
JIT = "backends/numpy/fast/jit.py"
DECODE = "backends/numpy/fast/decode.py"
LINEAR = "backends/numpy/fast/linear.py"
PRODUCT = "test_compiled.py::test_a_product_is_within_the_bound_of_naive_loops"
LAYERS = "test_compiled.py::test_whole_layers[gqa-float32]"

MUTANTS = [
    Mutant(
        "numbers left over by the vectors dropped",
        VECTORS,
        "(1, whole, count)):",
        "(1, whole, whole)):",
        PRODUCT,
    ),
    Mutant(
        "bfloat16 widened by a bit too few",
        VECTORS,
        "ir.Constant(wide, [16] * lanes)",
        "ir.Constant(wide, [15] * lanes)",
        PRODUCT,
    ),
    Mutant(
        "halves of the lanes not all added",
        VECTORS,
        "for i in (0, count)\n",
        "for i in (0, 0)\n",
        PRODUCT,
    ),
    Mutant(
        "sums in an order that the number of tokens decides",
        VECTORS,
        "whole = builder.and_(count, _integer(-LANES))",
        "whole = builder.and_(count, _integer(-LANES * tokens))",
        "test_compiled.py::test_a_row_does_not_depend_on_the_others_or_on_threads",
    ),
    Mutant(
        "rows left over by the tiles not computed",
        KERNELS,
        "i = stop - ROWS",
        "i = start",
        PRODUCT,
    ),
    Mutant(
        "threads that do not wait for the keys",
        KERNELS,
        "until(address, round_ * team, address + 8)",
        "until(address, 0, address + 8)",
        "test_compiled.py::test_a_sequence_does_not_depend_on_its_batch_or_on_threads",
    ),
    Mutant(
        "chunks of attention added without their largest scores",
        KERNELS,
        "factor = exp(own - shift) if own",
        "factor = np.float32(1) if own",
        "test_compiled.py::test_attention_in_chunks",
    ),
    Mutant(
        "a ring's slots not wrapped",
        KERNELS,
        "(place + token % seq) % capacity",
        "min(place + token % seq, capacity - 1)",
        "test_compiled.py::test_a_ring",
    ),
    Mutant(
        "one window for all layers in a kernel",
        DECODE,
        "windows.index(config.window_of(i))",
        "windows.index(config.window_of(0))",
        "test_compiled.py::test_whole_layers[some windows-float32]",
    ),
    Mutant(
        "gate's bias added to what it gates",
        "weights.py",
        'mlp.gate_bias",\n    "mlp.up_proj",\n    "mlp.up_bias',
        'mlp.up_bias",\n    "mlp.up_proj",\n    "mlp.gate_bias',
        "test_compiled.py::test_whole_layers[biases-float32]",
    ),
    Mutant(
        "an exchanged layer not noticed",
        DECODE,
        "all(a is b for a, b in zip(",
        "all(True for a, b in zip(",
        "test_compiled.py::test_weights_changed_in_place_count_and_so_do_exchanged_layers",
    ),
    Mutant(
        "taps not called where layers are compiled",
        DECODE,
        "cache is None or tap is not untouched or not few",
        "cache is None or not few",
        "test_compiled.py::test_what_the_kernel_of_layers_does_not_take",
    ),
    Mutant(
        "weights of other formats read as those of the first",
        DECODE,
        "if len(kinds) == 1 and",
        "if",
        "test_compiled.py::test_what_the_kernel_of_layers_does_not_take",
    ),
    Mutant(
        "a weight in another order read as if it were in rows",
        LINEAR,
        "        or not weight.flags.c_contiguous\n",
        "",
        "test_compiled.py::test_what_the_kernel_does_not_take_goes_to_blas",
    ),
    Mutant(
        "the bias forgotten with many tokens",
        LINEAR,
        "operands(x, weight, wide, y, size)",
        "operands(x, weight, None, y, size)",
        "test_compiled.py::test_many_tokens_and_narrow_weights",
    ),
    Mutant(
        "the bias forgotten with few tokens",
        LINEAR,
        "        y += bias.astype(np.float32, copy=False)\n",
        "        pass\n",
        PRODUCT,
    ),
    Mutant(
        "a term of the exponential left out",
        ELEMENTS,
        "p = p * r + np.float32(1 / 24)",
        "p = p * r",
        "test_compiled.py::test_exponentials",
    ),
    Mutant(
        "the exponential of NaN a number",
        ELEMENTS,
        "return p * low * high if x == x else x",
        "return p * low * high",
        "test_compiled.py::test_exponentials",
    ),
    Mutant(
        "every layer taken to be as large as the first",
        DECODE,
        "if not all(layer_fits(layer, config) for layer in layers):",
        "if False:",
        "test_compiled.py::test_layers_of_other_sizes_than_the_first",
    ),
    Mutant(
        "kernels kept though what they call has changed",
        JIT,
        "function.__qualname__ += ",
        "_ = ",
        "test_compiled.py::test_kernels_are_compiled_anew_if_any_source_has_changed",
    ),
    Mutant(
        "waiting for a thread that was interrupted",
        "backends/numpy/fast/waiting.py",
        "if arrived(stop) != 0:",
        "if False:",
        "test_compiled.py::test_waiting_ends_when_it_is_to_no_purpose",
    ),
    Mutant(
        "other threads not told of an interruption",
        "backends/numpy/fast/team.py",
        "stop[-1] = 1",
        "stop[-1] = 0",
        "test_compiled.py::test_an_interrupted_team_waits_for_nobody_and_goes_on_working",
    ),
    Mutant(
        "bytes in the other order read as if they were in this",
        "backends/numpy/fast/formats.py",
        "if dtype.isnative else None",
        "if True else None",
        "test_compiled.py::test_bytes_in_the_other_order[float32-weight-3]",
    ),
    Mutant(
        "keys of padding weighed with zero, which makes NaN of NaN",
        KERNELS,
        "while first < last and not allowed[first]:",
        "while first < last and not allowed[last - 1]:",
        "test_compiled.py::test_padding_with_nan_reaches_no_token",
    ),
    Mutant(
        "an error where kernels cannot be kept",
        JIT,
        "except RuntimeError:",
        "except LookupError:",
        "test_compiled.py::test_kernels_work_where_nothing_can_be_kept",
    ),
    Mutant(
        "memory let go while a thread of an interrupted kernel reads it",
        "backends/numpy/fast/team.py",
        "self._wait()  #",
        "pass  #",
        "test_compiled.py::test_an_interrupted_team_waits_for_nobody_and_goes_on_working",
    ),
]

"""Bugs to plant in what CuPy's arrays are given to: cuBLAS, attention, RoPE and the gate."""

from __future__ import annotations

from catalogue import Mutant

CUBLAS = "backends/cupy/cublas.py"
LINEAR = "backends/cupy/linear.py"
ATTENTION = "backends/cupy/attention.py"
POINTWISE = "backends/cupy/pointwise.py"
SOFTMAX = "backends/cupy/kernels/softmax.cu"
POINTS = "backends/cupy/kernels/pointwise.cu"
NUMBERS = "backends/cupy/kernels/common.cuh"

LIBRARY = "gpu/test_cublas.py"
ANY_LAYOUT = f"{LIBRARY}::test_products_of_every_layout"
BATCHES = f"{LIBRARY}::test_batches"
MAPS = "gpu/test_linear_cupy.py"
MAP_CALLS = "gpu/test_linear_calls.py"
ATTENDS = "gpu/test_attention_cupy.py"
BLOCKS = f"{ATTENDS}::test_many_blocks"
ATTEND_CALLS = "gpu/test_attention_calls.py"
POINT_BY_POINT = "gpu/test_pointwise_cupy.py"

MUTANTS = [
    Mutant(
        "operands of cuBLAS in the order of rows",
        CUBLAS,
        "for array in (b, a, out)]",
        "for array in (a, b, out)]",
        ANY_LAYOUT,
    ),
    Mutant(
        "a transposed operand read as it lies",
        CUBLAS,
        "return _Layout(_OP_T, leading",
        "return _Layout(_OP_N, leading",
        ANY_LAYOUT,
    ),
    Mutant(
        "leading dimensions without their padding",
        CUBLAS,
        "leading = columns if rows == 1 else down",
        "leading = columns",
        ANY_LAYOUT,
    ),
    Mutant(
        "strides over a batch counted in bytes",
        CUBLAS,
        "*batch, down, right = (stride // array.itemsize for stride in array.strides)",
        "*_, down, right = (stride // array.itemsize for stride in array.strides)\n"
        "    batch = array.strides[:-2]",
        BATCHES,
    ),
    Mutant(
        "the first matrices of a batch alone",
        CUBLAS,
        "*matrices[2][:keep], *batch),",
        "*matrices[2][:keep], *(1 for _ in batch)),",
        BATCHES,
    ),
    Mutant(
        "sums of 16-bit results in 16 bits",
        CUBLAS,
        "handle, mode | _NO_REDUCED_PRECISION_REDUCTION)",
        "handle, mode)",
        f"{LIBRARY}::test_sums_of_16_bits_that_cancel",
    ),
    Mutant(
        "TF32 by default",
        CUBLAS,
        'os.environ.get("CUPY_TF32") == "1"',
        'os.environ.get("CUPY_TF32") != "0"',
        f"{LIBRARY}::test_tf32_only_where_the_environment_asks_for_it",
    ),
    Mutant(
        "a workspace set before the stream, which takes it away",
        CUBLAS,
        """\
        _call("cublasSetStream_v2", handle, stream)
        _call("cublasSetWorkspace_v2", handle, workspace.ptr, WORKSPACE)
""",
        """\
        _call("cublasSetWorkspace_v2", handle, workspace.ptr, WORKSPACE)
        _call("cublasSetStream_v2", handle, stream)
""",
        f"{LIBRARY}::test_each_stream_has_a_handle_and_a_workspace_set_after_it",
    ),
    Mutant(
        "one handle for all streams",
        CUBLAS,
        "key = (device, stream.ptr, thread)",
        "key = (device, 0, thread)",
        f"{LIBRARY}::test_each_stream_has_a_handle_and_a_workspace_set_after_it",
    ),
    Mutant(
        "one handle for the stream of each thread",
        CUBLAS,
        "key = (device, stream.ptr, thread)",
        "key = (device, stream.ptr, 0)",
        f"{LIBRARY}::test_threads_share_a_stream_but_not_the_one_of_each_thread",
    ),
    Mutant(
        "statuses of cuBLAS not looked at",
        CUBLAS,
        "    if status:\n",
        "    if status < 0:\n",
        f"{LIBRARY}::test_failures_are_named_and_leave_no_handle",
    ),
    Mutant(
        "a handle left over by a failure",
        CUBLAS,
        """        _call("cublasDestroy_v2", handle)
        raise""",
        """        raise""",
        f"{LIBRARY}::test_failures_are_named_and_leave_no_handle",
    ),
    Mutant(
        "sums of float64 in float32's name",
        CUBLAS,
        'scalar = c_double if name == "float64" else c_float',
        "scalar = c_float",
        f"{LIBRARY}::test_alpha_and_beta[stand-in-float64-float64]",
    ),
    Mutant(
        "a bias overwritten by the product",
        LINEAR,
        "beta=0.0 if bias is None else 1.0",
        "beta=0.0",
        f"{MAPS}::test_within_bound_of_naive_loops[stand-in-cuBLAS]",
    ),
    Mutant(
        "a bias rounded to 16 bits before it is added",
        LINEAR,
        "if out.dtype in (dtype, wide) and held else",
        "if out.dtype in (dtype, wide) else",
        f"{MAPS}::test_a_bias_keeps_its_digits[stand-in-cuBLAS-9]",
    ),
    Mutant(
        "each block of a narrow weight in the place of the first",
        LINEAR,
        "part = total[:, start : start + rows]",
        "part = total[:, : min(rows, weight.shape[0] - start)]",
        f"{MAPS}::test_within_bound_in_every_format[stand-in-cuBLAS in blocks-float32-bfloat16]",
    ),
    Mutant(
        "a narrow weight widened as a whole",
        LINEAR,
        "if weight.dtype != dtype:",
        "if weight.dtype != weight.dtype:",
        f"{MAP_CALLS}::test_a_narrow_weight_is_never_widened_as_a_whole",
    ),
    Mutant(
        "x narrowed to the weight's dtype",
        LINEAR,
        "dtype = x.dtype if weight.dtype == x.dtype else wide",
        "dtype = weight.dtype",
        f"{MAPS}::test_within_bound_in_every_format[stand-in-cuBLAS-float32-bfloat16]",
    ),
    Mutant(
        "weights copied for cuBLAS",
        LINEAR,
        "weight[start : start + rows].astype(dtype, copy=False)",
        "weight[start : start + rows].astype(dtype)",
        f"{MAP_CALLS}::test_weights_are_read_where_they_lie",
    ),
    Mutant(
        "probabilities rounded to bfloat16 on a GPU",
        ATTENTION,
        "else [parts[2], parts[1], parts[0]]",
        "else [parts[0]]",
        f"{ATTENDS}::test_values_that_cancel[stand-in-bfloat16]",
    ),
    Mutant(
        "probabilities of 16 bits in the place of 24",
        ATTENTION,
        "else [parts[2], parts[1], parts[0]]",
        "else [parts[1], parts[0]]",
        f"{ATTENDS}::test_probabilities_keep_their_last_bits",
    ),
    Mutant(
        "the parts of probabilities in the place of one another",
        ATTENTION,
        "beta=float(i > 0)",
        "beta=0.0",
        BLOCKS,
    ),
    Mutant(
        "scores of each group against the keys of another",
        ATTENTION,
        "grouped = xp.ascontiguousarray(q.reshape(by_head).transpose(1, 0, 2, 3))",
        "grouped = xp.ascontiguousarray(q.reshape(by_head).transpose(1, 0, 2, 3)[::-1])",
        BLOCKS,
    ),
    Mutant(
        "the keep of the first sequence for all",
        ATTENTION,
        "mask.keep[b, seen]",
        "mask.keep[0, seen]",
        BLOCKS,
    ),
    Mutant(
        "a boolean mask of the first sequence for all",
        ATTENTION,
        "rows[min(b, len(rows) - 1), start:stop]",
        "rows[0, start:stop]",
        BLOCKS,
    ),
    Mutant(
        "the boolean rows of the first block for each",
        ATTENTION,
        "rows[min(b, len(rows) - 1), start:stop]",
        "rows[min(b, len(rows) - 1), : stop - start]",
        BLOCKS,
    ),
    Mutant(
        "slots of the first keys for those of a window",
        ATTENTION,
        "mask.keys[seen])",
        "mask.keys[: seen.stop - seen.start])",
        BLOCKS,
    ),
    Mutant(
        "values from the first on for those of a window",
        ATTENTION,
        "cublas.matmul(part, values[:, seen], sums",
        "cublas.matmul(part, values[:, : seen.stop - seen.start], sums",
        BLOCKS,
    ),
    Mutant(
        "keys cut off by what the last query of a block sees of its window",
        ATTENTION,
        "keys > int(queries.min()) - window",
        "keys > int(queries.max()) - window",
        BLOCKS,
    ),
    Mutant(
        "keys cut off by what the first query of a block sees",
        ATTENTION,
        "(keys <= queries.max())",
        "(keys <= queries.min())",
        BLOCKS,
    ),
    Mutant(
        "later keys multiplied in vain",
        ATTENTION,
        "visible = (keys >= 0) & (keys <= queries.max())",
        "visible = keys >= 0",
        f"{ATTEND_CALLS}::test_keys_outside_a_block_are_left_out",
    ),
    Mutant(
        "keys copied for cuBLAS",
        ATTENTION,
        "kt = cublas.readable(k.transpose(1, 2, 0))",
        "kt = k.copy().transpose(1, 2, 0)",
        f"{ATTEND_CALLS}::test_keys_of_a_cache_are_not_copied",
    ),
    Mutant(
        "a mask looked at by every layer",
        ATTENTION,
        "_spans[mask] = known = step, spans",
        "known = step, spans",
        f"{ATTEND_CALLS}::test_a_mask_is_looked_at_once",
    ),
    Mutant(
        "rows of a group counted as queries",
        SOFTMAX,
        "const int query = blockIdx.x % rows / group;",
        "const int query = blockIdx.x % rows % (rows / group);",
        BLOCKS,
    ),
    Mutant(
        "warps that read a sum before others have written theirs",
        SOFTMAX,
        """\
  __syncthreads();
  float sum = 0;
""",
        """\
  float sum = 0;
""",
        BLOCKS,
    ),
    Mutant(
        "a row of scores of minus infinity divided by zero",
        SOFTMAX,
        "  if (sum == 0) sum = 1;\n",
        "",
        f"{ATTENDS}::test_scores_that_overflow",
    ),
    Mutant(
        "hidden keys in a kernel's sum",
        SOFTMAX,
        "if (visible(key)) sum += expf",
        "sum += expf",
        BLOCKS,
    ),
    Mutant(
        "a window of one key more",
        SOFTMAX,
        "own - slot < window",
        "own - slot <= window",
        BLOCKS,
    ),
    Mutant(
        "bfloat16 by cutting bits off",
        NUMBERS,
        "return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;",
        "return bits >> 16;",
        f"{POINT_BY_POINT}::test_narrow_formats_are_turned_in_float32_and_rounded_once",
    ),
    Mutant(
        "ties of bfloat16 always up",
        NUMBERS,
        "(bits + 0x7fff + (bits >> 16 & 1)) >> 16",
        "(bits + 0x8000) >> 16",
        f"{POINT_BY_POINT}::test_ties_of_bfloat16_go_to_even",
    ),
    Mutant(
        "NaN of bfloat16 turned into infinity or zero",
        NUMBERS,
        "  if (x != x) return (bits >> 16) | 0x40;\n",
        "",
        f"{POINT_BY_POINT}::test_nan_of_any_bits_stays_nan",
    ),
    Mutant(
        "the other half turned the other way",
        POINTS,
        "narrow(b * cos[angle] + a * sin[angle])",
        "narrow(b * cos[angle] - a * sin[angle])",
        f"{POINT_BY_POINT}::test_basis_vectors",
    ),
    Mutant(
        "angles of the first sequence for all, in a kernel",
        POINTWISE,
        "cos.size // half)",
        "cos.shape[-2])",
        f"{POINT_BY_POINT}::test_turns_are_within_the_bound",
    ),
    Mutant(
        "angles of heads, not of tokens, in a kernel",
        POINTS,
        "head / heads % rows * half + i",
        "head % rows * half + i",
        f"{POINT_BY_POINT}::test_turns_are_within_the_bound",
    ),
    Mutant(
        "layouts of channels taken for each other, in a kernel",
        POINTWISE,
        'INTERLEAVED=int(layout != "half")',
        'INTERLEAVED=int(layout == "half")',
        f"{POINT_BY_POINT}::test_turns_are_within_the_bound",
    ),
    Mutant(
        "a gate that overflows where it should vanish",
        POINTS,
        "const float decay = expf(-fabsf(g));",
        "const float decay = expf(-g);",
        f"{POINT_BY_POINT}::test_pins",
    ),
    Mutant(
        "the last threads' numbers left out",
        POINTWISE,
        "blocks = math.ceil(count / THREADS)",
        "blocks = max(1, count // THREADS)",
        f"{POINT_BY_POINT}::test_gate_of_every_size",
    ),
    Mutant(
        "threads beyond the last number write",
        POINTS,
        "  if (i >= count) return;\n",
        "",
        f"{POINT_BY_POINT}::test_gate_of_every_size",
    ),
]

"""Bugs to plant, and the test that must find each.

A bug replaces one text, found exactly once in one file of the package.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """A planted bug."""

    name: str
    file: str
    """Below llama_layers/."""
    old: str
    new: str
    killed_by: str
    """Node id of a test, below tests/."""


MUTANTS = [
    Mutant(
        "keys and values swapped",
        "projection.py",
        """\
        xp.reshape(y[:, :, end_of_q:end_of_k], (batch, seq, w.num_kv_heads, w.head_dim)),
        xp.reshape(y[:, :, end_of_k:], (batch, seq, w.num_kv_heads, w.head_dim)),
""",
        """\
        xp.reshape(y[:, :, end_of_k:], (batch, seq, w.num_kv_heads, w.head_dim)),
        xp.reshape(y[:, :, end_of_q:end_of_k], (batch, seq, w.num_kv_heads, w.head_dim)),
""",
        "test_projection.py::test_within_bound_of_naive_loops[numpy]",
    ),
    Mutant(
        "keys and values swapped where they are fused",
        "qkv_weights.py",
        "xp.concat([q, k, v], axis=0)",
        "xp.concat([q, v, k], axis=0)",
        "test_weights.py::test_from_separate[numpy-4-2]",
    ),
    Mutant(
        "biases in another order than their rows",
        "qkv_weights.py",
        "return xp.concat(list(biases))",
        "return xp.concat(list(biases)[::-1])",
        "test_weights.py::test_from_separate[numpy-4-4]",
    ),
    Mutant(
        "square weights transposed",
        "backends/numpy/linear.py",
        "yt = weight @ xt",
        "yt = (weight.T if weight.shape[0] == weight.shape[1] else weight) @ xt",
        "test_linear.py::test_one_row[numpy]",
    ),
    Mutant(
        "layout of square weights taken for the other",
        "qkv_weights.py",
        "q, k, v = q.T, k.T, v.T",
        "q, k, v = (m if m.shape[0] == m.shape[1] else m.T for m in (q, k, v))",
        "test_projection.py::test_both_layouts_agree[numpy]",
    ),
    Mutant(
        "heads in the order of channels",
        "projection.py",
        "xp.reshape(y[:, :, :end_of_q], (batch, seq, w.num_heads, w.head_dim)),",
        "xp.permute_dims("
        "xp.reshape(y[:, :, :end_of_q], (batch, seq, w.head_dim, w.num_heads)), (0, 1, 3, 2)),",
        "test_projection.py::test_heads_follow_their_rows[numpy]",
    ),
    Mutant(
        "keys repeated for every query head",
        "projection.py",
        "xp.reshape(y[:, :, end_of_q:end_of_k], (batch, seq, w.num_kv_heads, w.head_dim)),",
        "xp.repeat(xp.reshape(y[:, :, end_of_q:end_of_k], (batch, seq, w.num_kv_heads, "
        "w.head_dim)), w.num_heads // w.num_kv_heads, axis=2),",
        "test_projection.py::test_shapes[numpy]",
    ),
    Mutant(
        "grouped heads forgotten in the view of the keys",
        "qkv_weights.py",
        "start : start + self.num_kv_heads * self.head_dim",
        "start : start + self.num_heads * self.head_dim",
        "test_weights.py::test_views_are_the_rows_of_the_heads[numpy]",
    ),
    Mutant(
        "grouped heads forgotten in the view of the values",
        "qkv_weights.py",
        "(self.num_heads + self.num_kv_heads) * self.head_dim :",
        "2 * self.num_kv_heads * self.head_dim :",
        "test_weights.py::test_views_are_the_rows_of_the_heads[numpy]",
    ),
    Mutant(
        "bias dropped by the projection",
        "projection.py",
        "y = linear(x, w.fused, w.bias)",
        "y = linear(x, w.fused)",
        "test_projection.py::test_within_bound_of_naive_loops[numpy]",
    ),
    Mutant(
        "bias dropped by the portable body",
        "projection.py",
        "y = y + xp.astype(bias, wide, copy=False)",
        "y = y + 0.0",
        "test_linear.py::test_within_bound_of_naive_loops[strict-device1]",
    ),
    Mutant(
        "bias dropped by the NumPy body",
        "backends/numpy/linear.py",
        "yt += bias.astype(wide, copy=False)[:, None]",
        "yt += 0",
        "test_linear.py::test_within_bound_of_naive_loops[numpy]",
    ),
    Mutant(
        "bias dropped by the CuPy body",
        "backends/cupy/linear.py",
        "y.astype(wide, copy=False) + bias.astype(wide, copy=False)",
        "y.astype(wide, copy=False)",
        "test_cupy_route.py::test_linear_2d[True-bfloat16]",
    ),
    Mutant(
        "a column of zeros",
        "backends/numpy/linear.py",
        "    y: NDArray[Any] = yt.T.astype",
        "    yt[-1:] = 0\n    y: NDArray[Any] = yt.T.astype",
        "test_checkpoint_02_qkv.py::test_qkv_complete_validation[numpy]",
    ),
    Mutant(
        "sums kept in bfloat16",
        "backends/numpy/linear.py",
        "np.matmul(block, xt, out=yt[start : start + rows])",
        "yt[start : start + rows] = (block[:, :, None] * xt).astype(x.dtype).sum(axis=1)",
        "test_linear.py::test_bfloat16_sums_are_kept_in_float32",
    ),
    Mutant(
        "norm's mean kept in bfloat16",
        "norm.py",
        "xp.mean(wide_x * wide_x,",
        "xp.mean(x * x,",
        "test_norm.py::test_bfloat16_mean_is_kept_in_float32",
    ),
    Mutant(
        "float16 storage that says float32",
        "qkv_weights.py",
        "return cls(xp.concat([q, k, v], axis=0),",
        "return cls(xp.astype(xp.astype(xp.concat([q, k, v], axis=0), xp.float16), q.dtype),",
        "test_projection.py::test_both_layouts_agree[numpy]",
    ),
    Mutant(
        "float16 activations that say float32",
        "backends/numpy/linear.py",
        "xt = x.astype(wide, copy=False).T",
        "xt = x.astype(np.float16).astype(wide).T",
        "test_linear.py::test_within_bound_of_naive_loops[numpy]",
    ),
    Mutant(
        "a weight copied at each call on CuPy",
        "backends/cupy/linear.py",
        "y = x @ weight.T",
        "y = x @ weight.T.copy()",
        "test_cupy_route.py::test_linear_2d[False-float32]",
    ),
    Mutant(
        "a product of three dimensions on CuPy",
        "projection.py",
        "y = linear_2d(xp, xp.reshape(x, (rows, x.shape[-1])), weight, bias)",
        "y = linear_2d(xp, x, weight, bias)",
        "test_cupy_route.py::test_linear[shape2-float32]",
    ),
    Mutant(
        "another eps than the one given",
        "norm.py",
        "xp.sqrt(mean_square + eps)",
        "xp.sqrt(mean_square + 1e-6)",
        "test_norm.py::test_eps_is_the_one_given[definition-numpy]",
    ),
    Mutant(
        "eps outside the root",
        "norm.py",
        "xp.sqrt(mean_square + eps)",
        "(xp.sqrt(mean_square) + eps)",
        "test_norm.py::test_eps_stands_under_the_root[definition-numpy]",
    ),
    Mutant(
        "a norm that subtracts the mean",
        "norm.py",
        "    mean_square = xp.mean",
        "    wide_x = wide_x - xp.mean(wide_x, axis=-1, keepdims=True)\n    mean_square = xp.mean",
        "test_norm.py::test_root_mean_square_of_the_result_is_one[definition-numpy]",
    ),
    Mutant(
        "the sum of squares for their mean",
        "norm.py",
        "xp.mean(wide_x * wide_x,",
        "xp.sum(wide_x * wide_x,",
        "test_norm.py::test_constant_row_becomes_signed_ones[definition-numpy-3.0]",
    ),
    Mutant(
        "norm's weight skipped",
        "norm.py",
        " * xp.astype(weight, wide, copy=False)",
        "",
        "test_norm.py::test_linear_in_the_weight[definition-numpy]",
    ),
    Mutant(
        "norm rounded before its weight is applied",
        "norm.py",
        "    y = wide_x / xp.sqrt(mean_square + eps) * xp",
        "    y = wide_x / xp.sqrt(mean_square + eps)\n"
        "    y = xp.astype(xp.astype(y, x.dtype), wide) * xp",
        "test_norm.py::test_rounds_to_the_dtype_of_x_once",
    ),
    Mutant(
        "norm left in the dtype of its sums",
        "norm.py",
        "return xp.astype(y, x.dtype, copy=False)",
        "return y",
        "test_norm.py::test_within_bound_in_every_format[definition-bfloat16-bfloat16]",
    ),
    Mutant(
        "embedding scaled, as in another family",
        "embedding.py",
        "rows = xp.take(table, xp.reshape(input_ids, (size,)), axis=0)",
        "rows = xp.take(table, xp.reshape(input_ids, (size,)), axis=0) * table.shape[1] ** 0.5",
        "test_embed.py::test_rows_bit_for_bit[numpy]",
    ),
    Mutant(
        "negative ids count from the end",
        "embedding.py",
        "int(xp.min(input_ids)) >= 0 and int(xp.max(input_ids)) < table.shape[0]",
        "int(xp.max(input_ids)) < table.shape[0]",
        "test_embed.py::test_refuses",
    ),
    Mutant(
        "rows that fill no head accepted",
        "qkv_weights.py",
        "if self.fused.shape[0] % together or not self.fused.shape[0]:",
        "if not self.fused.shape[0]:",
        "test_weights.py::test_refuses",
    ),
    Mutant(
        "weights that do not fit each other accepted",
        "shapes.py",
        "not isinstance(size, str) and size != found",
        "False",
        "test_weights.py::test_mlp_weights_refuse",
    ),
    Mutant(
        "an output projection that does not fit its heads accepted",
        "weights.py",
        'check_shape("o_proj", self.o_proj, hidden, self.qkv.num_heads * self.qkv.head_dim)',
        "pass",
        "test_weights.py::test_attention_weights_refuse",
    ),
    Mutant(
        "biases of an MLP not looked at",
        "weights.py",
        "if (bias := getattr(self, name)) is not None:",
        "if (bias := None) is not None:",
        "test_weights.py::test_mlp_weights_refuse",
    ),
    Mutant(
        "devices not compared",
        "backends/namespaces.py",
        "            _check_device(name, device(array), first, device(arrays[first]))",
        "            pass",
        "test_linear.py::test_refuses_devices_that_differ",
    ),
    Mutant(
        "faster bodies never taken",
        "backends/dispatch.py",
        "(body := bodies.get(name)) is None",
        "(body := bodies.get('')) is None",
        "test_backends.py::test_dispatch_takes_the_body_of_the_library",
    ),
    Mutant(
        "eps guessed where the file is silent",
        "config_schema.py",
        "    content = dict(file)\n",
        '    content = {"rms_norm_eps": 1e-6} | dict(file)\n',
        "test_config_refusals.py::test_files_must_say",
    ),
    Mutant(
        "keys of other architectures passed over",
        "config_keys.py",
        "        if known and not _is_neutral(key, value, config):\n",
        "        if False:\n",
        "test_config_refusals.py::test_refuses",
    ),
    Mutant(
        "RoPE scaling read and dropped",
        "rope_scaling.py",
        "    return RopeScaling(kind, **{key: given[key] for key in read if key in given}), "
        "tuple(unread)\n",
        "    return None, tuple(unread)\n",
        "test_rope_scaling.py::test_reads",
    ),
    Mutant(
        "biases of Qwen2 forgotten",
        "config.py",
        'return self.attention_bias or self.model_type == "qwen2"',
        "return self.attention_bias",
        "test_config.py::test_reads_qwen2",
    ),
    Mutant(
        "head_dim divided by the key heads",
        "config.py",
        '"head_dim", self.hidden_size // self.num_attention_heads',
        '"head_dim", self.hidden_size // self.num_key_value_heads',
        "test_config.py::test_reads_a_published_file",
    ),
    Mutant(
        "Llama 2 with the eps of Llama 1",
        "presets.py",
        '{"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}',
        '{"max_position_embeddings": 4096}',
        "test_config.py::test_presets_agree_with_published_files",
    ),
    Mutant(
        "Llama 2 70B without grouped heads",
        "presets.py",
        '"8192 28672 80 64 8", _LLAMA_2',
        '"8192 28672 80 64 64", _LLAMA_2',
        "test_config.py::test_presets_have_the_published_number_of_parameters[llama2_70b]",
    ),
    Mutant(
        "limit too loose by n",
        "verify/bounds/linear.py",
        "grown = gamma(n, sums.unit_roundoff) * magnitude",
        "grown = n * gamma(n, sums.unit_roundoff) * magnitude",
        "test_bounds.py::test_linear_limit_is_the_formula[float32]",
    ),
    Mutant(
        "limit of the output's format, vacuous for bfloat16",
        "verify/bounds/linear.py",
        "grown = gamma(n, sums.unit_roundoff) * magnitude",
        "grown = gamma(n, out.unit_roundoff) * magnitude",
        "test_bounds.py::test_linear_limit_is_the_formula[bfloat16]",
    ),
    Mutant(
        "limit that forgets the output's rounding",
        "verify/bounds/linear.py",
        "rounding += out.unit_roundoff * np.abs(exact) + out.smallest_subnormal",
        "rounding += out.smallest_subnormal",
        "test_bounds.py::test_linear_limit_is_the_formula[bfloat16]",
    ),
    Mutant(
        "limit that forgets a product rounded before its bias",
        "verify/bounds/linear.py",
        "rounding += out.unit_roundoff * np.abs(product)",
        "rounding += 0",
        "test_bounds.py::test_linear_bias_may_take_away_a_rounded_product",
    ),
    Mutant(
        "limit that lets cancellation shrink it",
        "verify/bounds/linear.py",
        "magnitude = finite_x @ finite_w.T",
        "magnitude = np.abs(finite_x * np.sign(x) @ w.T)",
        "test_bounds.py::test_linear_true_error_is_within_the_limit_in_any_order",
    ),
    Mutant(
        "some error allowed where all products are zero",
        "verify/bounds/linear.py",
        "bound[exactly_zero] = 0.0",
        "pass",
        "test_bounds.py::test_nothing_is_allowed_where_every_product_is_zero",
    ),
    Mutant(
        "overflow of partial sums forgotten",
        "verify/bounds/linear.py",
        "can_overflow = ~(magnitude + growth < sums.max)",
        "can_overflow = ~(np.abs(exact) + growth < sums.max)",
        "test_bounds.py::test_nothing_is_said_where_overflow_is_possible",
    ),
    Mutant(
        "ratio that passes over NaN",
        "verify/bounds/bound.py",
        "ratio[~same & ~(np.isfinite(values) & np.isfinite(exact))] = np.inf",
        "ratio[~same & np.isnan(ratio)] = 0.0",
        "test_bounds.py::test_ratio_of_each_kind",
    ),
    Mutant(
        "usual error ten times too large",
        "verify/bounds/bound.py",
        "return min(4 * math.sqrt(n) * u, gamma(n, u))",
        "return min(40 * math.sqrt(n) * u, gamma(n, u))",
        "test_bounds.py::test_usual_is_four_root_n_u",
    ),
    Mutant(
        "norm's limit without the root's halving",
        "verify/bounds/norm.py",
        "root = -0.5 * np.log1p(-np.minimum(mean_error, 1))",
        "root = -np.log1p(-np.minimum(mean_error, 1))",
        "test_bounds.py::test_rms_norm_limit_is_the_formula",
    ),
    Mutant(
        "norm's exact result without eps",
        "verify/bounds/norm.py",
        "row = x64 / np.sqrt(mean_square + eps)",
        "row = x64 / np.sqrt(mean_square)",
        "test_norm.py::test_within_bound_of_naive_loops[definition-numpy]",
    ),
    Mutant(
        "FAIL only far beyond the limit",
        "verify/judge.py",
        "if self.ratio > 1:",
        "if self.ratio > 2:",
        "test_bounds.py::test_verdicts_fall_at_the_two_limits",
    ),
    Mutant(
        "bits compared as numbers",
        "testing/assertions.py",
        "differ = np.argwhere(bits_a != bits_b)",
        "differ = np.argwhere(a != b)",
        "test_testing.py::test_same_bits_of_zeros_and_nans",
    ),
    Mutant(
        "queries and keys of a GGUF left permuted",
        "checkpoint/gguf_file.py",
        'permuted=architecture == "llama")',
        "permuted=False)",
        "checkpoint/test_gguf.py::test_plain_numbers",
    ),
    Mutant(
        "keys un-permuted with the number of query heads",
        "checkpoint/names.py",
        "return config.num_key_value_heads",
        "return config.num_attention_heads",
        "checkpoint/test_gguf.py::test_plain_numbers",
    ),
    Mutant(
        "rows permuted once more, not back",
        "checkpoint/names.py",
        "pairs = array.reshape(heads, -1, 2, *array.shape[1:])",
        "pairs = array.reshape(heads, 2, -1, *array.shape[1:])",
        "checkpoint/test_names.py::test_rows_come_back_for_all_head_ratios",
    ),
]

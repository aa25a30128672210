"""Bugs to plant in the bounds of a layer's operations: terms forgotten, or too many."""

from __future__ import annotations

from catalogue import Mutant

POINTWISE = "verify/bounds/pointwise.py"
ROPE = "verify/bounds/rope.py"
SCORES = "verify/bounds/scores.py"
SOFTMAX = "verify/bounds/softmax.py"
ATTENTION = "verify/bounds/attention.py"

MUTANTS = [
    # What every bound is made of.
    Mutant(
        "rounding that forgets its own error",
        "verify/bounds/bound.py",
        "return error * (1 + u) + u * finite_magnitude(value) + to.smallest_subnormal",
        "return error * (1 + u) + to.smallest_subnormal",
        "test_bounds_pointwise.py::test_residual_limit_is_the_formula[bfloat16]",
    ),
    Mutant(
        "float64 result held against itself",
        "verify/bounds/bound.py",
        'return 1 + FLOATS["float64"].unit_roundoff / sums.unit_roundoff',
        "return 1.0",
        "test_bounds_attention.py::test_attention_limit_is_the_formula[float64]",
    ),
    Mutant(
        "rounding allowed into a format that holds the sums",
        "verify/bounds/bound.py",
        "return None if to is None or to.holds(of) else to",
        "return to",
        "test_bounds_pointwise.py::test_formats_that_hold_the_sums_round_nothing",
    ),
    Mutant(
        "overflow into the result's format forgotten",
        "verify/bounds/bound.py",
        "return np.isfinite(magnitude) & (np.abs(magnitude) + error >= to.max)",
        "return np.zeros(np.shape(magnitude), bool)",
        "test_bounds_attention.py::test_overflowing_values_and_results",
    ),
    Mutant(
        "underflow of engines that flush forgotten",
        "verify/bounds/bound.py",
        "return sums.smallest_normal if flushes else sums.smallest_subnormal",
        "return sums.smallest_subnormal",
        "test_bounds_rope.py::test_flushing_engines",
    ),
    Mutant(
        "limits where the result is certain",
        "verify/bounds/bound.py",
        "limit[np.broadcast_to(certain, exact.shape) & np.isfinite(exact)] = 0.0",
        "pass",
        "test_bounds_attention.py::test_queries_that_may_see_nothing",
    ),
    # Norm, gate and residual.
    Mutant(
        "normalised row's rounding forgotten",
        "verify/bounds/norm.py",
        "roundings += np.log1p(between.unit_roundoff)",
        "pass",
        "test_bounds_pointwise.py::test_norm_that_rounds_its_row_is_told_apart",
    ),
    Mutant(
        "silu's rounding forgotten",
        POINTWISE,
        "error = rounded(error, gated, between) * size_h",
        "error = error * size_h",
        "test_bounds_pointwise.py::test_swiglu_that_rounds_silu_is_told_apart",
    ),
    Mutant(
        "silu's tanh form forgotten",
        POINTWISE,
        "error = relative * finite_magnitude(gated) + u * exp_ulps * size_g * (1 + relative)",
        "error = relative * finite_magnitude(gated)",
        "test_bounds_pointwise.py::test_swiglu_true_error_is_within_the_limit[float32]",
    ),
    Mutant(
        "gate's roundings counted ten times",
        POINTWISE,
        "compounded(gamma(4, u),",
        "compounded(gamma(40, u),",
        "test_bounds_pointwise.py::test_swiglu_limit_is_the_formula[float32]",
    ),
    Mutant(
        "residual's limit from what is added, not from the sum",
        POINTWISE,
        "sums.unit_roundoff * finite_magnitude(exact)",
        "sums.unit_roundoff * (finite_magnitude(a64) + finite_magnitude(b64))",
        "test_bounds_pointwise.py::test_residual_limit_is_the_formula[float32]",
    ),
    Mutant(
        "rows of a table off by one",
        POINTWISE,
        "exact = rows[chosen].astype(np.float64)",
        "exact = rows[chosen - 1].astype(np.float64)",
        "test_bounds_pointwise.py::test_rows_of_a_table_are_exact[float32]",
    ),
    # RoPE.
    Mutant(
        "RoPE's products forgotten",
        ROPE,
        "steps = [u, u] if between is None",
        "steps = [0.0, 0.0] if between is None",
        "test_bounds_rope.py::test_limit_is_the_formula",
    ),
    Mutant(
        "rounded products of RoPE counted once",
        ROPE,
        "else [u, u, between.unit_roundoff, between.unit_roundoff]",
        "else [u, u, between.unit_roundoff]",
        "test_bounds_rope.py::test_limit_with_rounded_table_products_and_phases",
    ),
    Mutant(
        "rounded table forgotten",
        ROPE,
        "tau = compounded(2 * u * trig_ulps, extra,",
        "tau = compounded(2 * u * trig_ulps,",
        "test_bounds_rope.py::test_a_rounded_table_and_products_are_told_apart",
    ),
    Mutant(
        "phase's error that does not grow with the position",
        ROPE,
        "return angles, np.abs(angles) * errors",
        "return angles, errors + 0 * angles",
        "test_bounds_rope.py::test_float32_phases_are_told_apart",
    ),
    Mutant(
        "position's phase rounded although it is zero",
        ROPE,
        "still = (angles == 0) & (factor == 1)",
        "still = angles != angles",
        "test_bounds_rope.py::test_nothing_is_allowed_at_position_zero",
    ),
    Mutant(
        "band of llama3's blend forgotten",
        ROPE,
        "return np.where(inside, turns * (roundings + 4) / (high - low) + 3, 0.0)",
        "return np.where(inside, 1e6, 1e6)",
        "test_bounds_rope.py::test_scaled_frequencies_in_float32",
    ),
    Mutant(
        "dynamic length of the first sequence",
        ROPE,
        "length = int(positions.max()) + 1 if positions.size else None",
        "length = int(positions.reshape(-1, positions.shape[-1])[0].max()) + 1 "
        "if positions.size else None",
        "test_bounds_rope.py::test_positions_of_each_sequence_and_the_largest_of_all",
    ),
    Mutant(
        "second channel turned the other way",
        ROPE,
        "second, first, cos, sin),",
        "second, first, cos, -sin),",
        "test_bounds_rope.py::test_true_error_is_within_the_limit",
    ),
    # Scores.
    Mutant(
        "scores' sum forgotten",
        SCORES,
        "growth = own_error(self.sums) * self._growth(grow(n, u))",
        "growth = own_error(self.sums) * self._growth(grow(4, u))",
        "test_bounds_scores.py::test_scores_limit_is_the_formula[float32]",
    ),
    Mutant(
        "scores' limit that cancellation shrinks",
        SCORES,
        "magnitude = size_q @ size_k.T",
        "magnitude = np.abs(product)",
        "test_bounds_scores.py::test_scores_true_error_is_within_the_limit[float32]",
    ),
    Mutant(
        "scores rounded once, not twice",
        SCORES,
        "error = rounded(error, product, self.between) * c + underflow",
        "error = error * c + underflow",
        "test_bounds_scores.py::test_scores_limit_is_the_formula[float32]",
    ),
    Mutant(
        "queries rounded, keys not",
        SCORES,
        "return compounded(sums, each, each)",
        "return compounded(sums, each)",
        "test_bounds_scores.py::test_scores_limit_is_the_formula[float32]",
    ),
    Mutant(
        "key heads tiled instead of grouped",
        SCORES,
        "yield Tile(b, h, slice(h * group, (h + 1) * group), rows)",
        "yield Tile(b, h, slice(h, heads, kv_heads), rows)",
        "test_bounds_scores.py::test_scores_true_error_is_within_the_limit[float32]",
    ),
    Mutant(
        "scores' overflow before they are scaled forgotten",
        SCORES,
        "overflows = ~(max(1.0, c) * (magnitude + error) < self.sums.max)",
        "overflows = ~(c * (magnitude + error) < self.sums.max)",
        "test_bounds_scores.py::test_scores_that_overflow_vanish_or_are_not_finite",
    ),
    # Probabilities.
    Mutant(
        "scores' error that does not reach the exponentials",
        SOFTMAX,
        "delta = error * (1 + u) + u * (distance + 2 * most)",
        "delta = u * (distance + 2 * most)",
        "test_bounds_scores.py::test_probabilities_limit_is_the_formula",
    ),
    Mutant(
        "subtraction of the largest score taken for exact",
        SOFTMAX,
        "delta = error * (1 + u) + u * (distance + 2 * most)",
        "delta = error * (1 + u) + u * 2 * most",
        "test_bounds_scores.py::test_softmax_limit_is_the_formula[float32]",
    ),
    Mutant(
        "exponentials taken for exact",
        SOFTMAX,
        "exponential = compounded(2 * u * exp_ulps, grow(steps, u))",
        "exponential = compounded(0.0, grow(steps, u))",
        "test_bounds_scores.py::test_softmax_limit_is_the_formula[float32]",
    ),
    Mutant(
        "normalisation taken for exact",
        SOFTMAX,
        "normalising = compounded(quotient((gamma, usual_growth)[which](n, u)), u, u)",
        "normalising = 0.0",
        "test_bounds_scores.py::test_softmax_limit_is_the_formula[float32]",
    ),
    Mutant(
        "sum of the exponentials taken for exact",
        SOFTMAX,
        "error = grown + p * share + normalising * (p + grown)",
        "error = grown + normalising * (p + grown)",
        "test_bounds_scores.py::test_softmax_limit_is_the_formula[float32]",
    ),
    Mutant(
        "mask of the first sequence for all",
        SOFTMAX,
        "return self.array[batch, rows]\n",
        "return self.array[0, rows]\n",
        "test_bounds_scores.py::test_masks_of_each_sequence_and_masks_to_add",
    ),
    Mutant(
        "mask's rows of the first tile for all",
        SOFTMAX,
        "return self.array[batch, rows]\n",
        "return self.array[batch, : rows.stop - rows.start]\n",
        "test_bounds_attention.py::test_tiles_do_not_change_the_bound",
    ),
    Mutant(
        "rounding of a sum with the mask forgotten",
        SOFTMAX,
        "np.where(exact == -np.inf, 0.0, rounded(error, exact, last))",
        "np.where(exact == -np.inf, 0.0, error)",
        "test_bounds_scores.py::test_masks_of_each_sequence_and_masks_to_add",
    ),
    Mutant(
        "hidden keys weigh",
        SOFTMAX,
        "visible = visible & allowed",
        "pass",
        "test_bounds_scores.py::test_softmax_true_error_is_within_the_limit[float32]",
    ),
    # Weighted sums and attention.
    Mutant(
        "weighted sum's gamma forgotten",
        ATTENTION,
        "compounded(grow(n, u), *each) * magnitude + underflow",
        "compounded(*each) * magnitude + underflow",
        "test_bounds_scores.py::test_weighted_sum_limit_is_the_formula[float32]",
    ),
    Mutant(
        "values' error without that of the sum of the weights",
        ATTENTION,
        "error = moved + np.abs(exact) * share + factor * (magnitude + moved) + underflow",
        "error = moved + factor * (magnitude + moved) + underflow",
        "test_bounds_attention.py::test_attention_limit_is_the_formula[float32]",
    ),
    Mutant(
        "attention's sums taken for exact",
        ATTENTION,
        "error = moved + np.abs(exact) * share + factor * (magnitude + moved) + underflow",
        "error = moved + np.abs(exact) * share + underflow",
        "test_bounds_attention.py::test_attention_limit_is_the_formula[float32]",
    ),
    Mutant(
        "rescaling of an online softmax forgotten",
        ATTENTION,
        "weights = weigh(errors, allowed, sums, exp_ulps, blocks)",
        "weights = weigh(errors, allowed, sums, exp_ulps)",
        "test_bounds_attention.py::test_attention_limit_is_the_formula[float32]",
    ),
    Mutant(
        "rounded probabilities forgotten",
        ATTENTION,
        "u, u, *(f.unit_roundoff for f in each))",
        "u, u)",
        "test_bounds_attention.py::test_rounded_scores_and_probabilities_are_told_apart",
    ),
    Mutant(
        "attention's result not rounded",
        ATTENTION,
        "form.max).any())\n            error = rounded(error, exact, narrowing(out, sums))",
        "form.max).any())",
        "test_bounds_attention.py::test_attention_of_engines[1.5-bfloat16]",
    ),
    Mutant(
        "exponentials that may be off by more than their sum",
        ATTENTION,
        "error = own_error(sums) * error / np.where(share < 1, 1 - share, 0.0)",
        "error = own_error(sums) * error",
        "test_bounds_attention.py::test_attention_limit_is_the_formula[bfloat16]",
    ),
]

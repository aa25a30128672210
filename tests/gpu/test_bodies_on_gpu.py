"""The properties of the bodies of CuPy on a real GPU; elsewhere those of what stands in for it.

The suite's other tests that take a `backend` run there too: ``pytest -m gpu``.
"""

from __future__ import annotations

import pytest
from conftest import Backend
from test_attention_cupy import (  # noqa: F401
    test_a_hidden_key_weighs_nothing_at_any_score,
    test_blocks_are_within_the_bound,
    test_causal,
    test_no_queries_and_no_keys,
    test_probabilities_keep_their_last_bits,
    test_scores_of_10000,
    test_values_that_cancel,
)
from test_gemv import (  # noqa: F401
    test_a_row_does_not_depend_on_the_others,
    test_which_products_the_kernel_takes,
)
from test_linear_cupy import (  # noqa: F401
    test_a_bias_is_added_before_rounding,
    test_a_bias_keeps_its_digits,
    test_logits_may_stay_in_float32,
    test_memory_order_is_free,
    test_within_bound_in_every_format,
)
from test_norm_cupy import (  # noqa: F401
    test_addresses_that_are_no_multiples_of_16_bytes,
    test_any_memory_order,
    test_every_width,
    test_nan_stays_in_its_row,
)
from test_pointwise_cupy import (  # noqa: F401
    test_gate_is_within_the_bound,
    test_gate_of_every_size,
    test_narrow_formats_are_turned_in_float32_and_rounded_once,
    test_queries_of_a_fused_product,
    test_ties_of_bfloat16_go_to_even,
    test_turns_are_within_the_bound,
)

from llama_layers.backends.cupy.detect import gpu_problem

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def backend():
    if (problem := gpu_problem()) is not None:
        pytest.skip(problem)
    from array_api_compat import cupy

    return Backend(cupy)


@pytest.fixture
def route():
    """The way of products: a kernel or cuBLAS, as on every GPU."""
    return "cuBLAS"

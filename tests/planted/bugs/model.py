"""Bugs of the model: embeddings, layers, the last norm and the head."""

from __future__ import annotations

import copy
from dataclasses import replace

from tests.planted.planting import wrong

EMBED = "llama_layers.model.embedding:embed"
FORWARD = "llama_layers.model.forward:forward"
LOOPS = "test_forward.py::test_like_naive_loops"


def with_weights(model, **changes):
    """The model with other weights, whether they fit its config or not."""
    changed = copy.copy(model)
    object.__setattr__(changed, "weights", replace(model.weights, **changes))
    return changed


@wrong(
    EMBED,
    "test_embed.py::test_rows_bit_for_bit[numpy]",
    "embedding scaled by the root of hidden_size",
)
def embedding_scaled_as_in_another_family(right, input_ids, table):
    return right(input_ids, table) * table.shape[1] ** 0.5


@wrong(EMBED, "test_embed.py::test_refuses")
def negative_ids_count_from_the_end(right, input_ids, table):
    return right(input_ids % table.shape[0], table)


@wrong(
    "llama_layers.backends.numpy:activations",
    LOOPS,
)
def embeddings_read_across_tokens(right, xp, x):
    y = right(xp, x)
    return y.reshape(-1, y.shape[-1], order="F").reshape(y.shape)


@wrong("llama_layers.model.forward:decoder_layers", LOOPS, "layer left out")
def the_last_layer_skipped(right, xp, x, model, *rest):
    return right(xp, x, with_weights(model, layers=model.weights.layers[:-1]), *rest)


@wrong("llama_layers.model.forward:decoder_layers", LOOPS, "another layer's weights")
def weights_of_the_first_layer_in_every_layer(right, xp, x, model, *rest):
    layers = [model.weights.layers[0]] * len(model.weights.layers)
    return right(xp, x, with_weights(model, layers=layers), *rest)


@wrong("llama_layers.model.forward:rms_norm", LOOPS, "norm skipped")
def the_last_norm_skipped(right, x, weight, **options):
    return x


@wrong("llama_layers.model.forward:rms_norm", LOOPS, "another eps")
def another_eps_in_the_last_norm(right, x, weight, **options):
    return right(x, weight, **options | {"eps": 1e-6})


@wrong(FORWARD, LOOPS, "embedding used as the head")
def the_embedding_used_as_the_head(right, model, input_ids, **options):
    return right(with_weights(model, lm_head=model.weights.embed_tokens), input_ids, **options)


@wrong(FORWARD, "test_forward.py::test_last_only_is_the_last_row")
def logits_of_the_first_token_instead_of_the_last(
    right, model, input_ids, *, last_only=False, **options
):
    output = right(model, input_ids, **options)
    return output._replace(logits=output.logits[:, :1]) if last_only else output


@wrong(FORWARD, "test_forward.py::test_given_positions")
def given_positions_ignored(right, model, input_ids, *, positions=None, **options):
    return right(model, input_ids, **options)


@wrong(FORWARD, "test_cache.py::test_attention_mask_of_new_tokens_or_of_all")
def the_first_columns_of_a_long_mask_read(
    right, model, input_ids, *, attention_mask=None, **options
):
    if attention_mask is not None:
        attention_mask = attention_mask[:, : input_ids.shape[1]]
    return right(model, input_ids, attention_mask=attention_mask, **options)


@wrong(FORWARD, "test_forward.py::test_the_last_token_is_no_padding")
def logits_after_padding_are_given(right, model, input_ids, *, last_only=False, **options):
    output = right(model, input_ids, **options)
    return output._replace(logits=output.logits[:, -1:]) if last_only else output

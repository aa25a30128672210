"""Bytes and operations, against closed forms and loops written here."""

from dataclasses import replace

import pytest

from llama_layers import LlamaConfig
from llama_layers.bench.cost import Cost, attention_cost, decode_cost, linear_cost, model_cost
from tests.support.random_models import GQA

SMOLLM2 = LlamaConfig.smollm2_135m()
PARAMETERS = 134_515_008  # published; the head is tied to the embedding


def test_projection_of_llama2_7b():
    assert linear_cost(12288, 4096, 8, 2) == Cost(2 * 12288 * 4096, 2 * 8 * 12288 * 4096)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("rows", "past"), [(1, 0), (1, 7), (5, 0), (4, 3)])
def test_attention_by_loops(window, rows, past):
    flops, read = 0, set()
    for query in range(past, past + rows):
        for key in range(query + 1):
            if window is None or query - key < window:
                flops += GQA.num_attention_heads * GQA.head_dim * 4
                read.add(key)
    read = {key for key in read if key < past}
    nbytes = len(read) * 2 * GQA.num_key_value_heads * GQA.head_dim * 4
    assert attention_cost(GQA, window, rows, past, 4) == Cost(nbytes, flops)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_pass_without_a_cache(tied, rows):
    # Hidden 10, MLP 14, 4 query and 2 key/value heads of 4, vocabulary 13, 2 layers.
    matrices = 10 * (16 + 8 + 8) + 16 * 10 + 3 * 10 * 14
    attention = 4 * 4 * 4 * sum(range(1, rows + 1))
    assert model_cost(replace(GQA, tie_word_embeddings=tied), rows, 0, 2, 4) == Cost(
        2 * (2 * (matrices + 2 * 10) + 10 + 13 * 10 + rows * 10),
        2 * (2 * rows * matrices + attention) + 2 * 13 * 10,
    )


def test_decoding_reads_each_weight_and_the_cache():
    row, token = 576 * 4, 2 * 30 * 3 * 64 * 4
    cost = decode_cost(SMOLLM2, 3, 100, 4, 4)
    assert cost.nbytes == PARAMETERS * 4 + row + 101 * token
    matrices = PARAMETERS - 61 * 576
    assert cost.flops == 2 * matrices + 30 * 4 * 9 * 64 * 102


def test_only_the_last_token_has_logits():
    one, two = (model_cost(SMOLLM2, rows, 0, 4, 4).flops for rows in (1, 2))
    in_layers = PARAMETERS - 61 * 576 - 49152 * 576
    assert two - one == 2 * in_layers + 30 * 4 * 9 * 64 * 2


def test_sequences_of_a_batch_share_the_weights():
    """Each has an embedding, keys and values of its own, and logits."""
    one, three = (decode_cost(SMOLLM2, 4, 100, 2, 4, batch) for batch in (1, 3))
    row, token = 576 * 2, 2 * 30 * 3 * 64 * 4
    assert three.nbytes - one.nbytes == 2 * row + 2 * token * (100 + 101 + 102 + 103) // 4
    assert three.flops == 3 * one.flops


def test_each_layer_has_its_own_window():
    config = replace(GQA, sliding_window=2, layer_types=("full_attention", "sliding_attention"))
    unlimited = model_cost(GQA, 1, 9, 4, 4)
    assert unlimited.nbytes - model_cost(config, 1, 9, 4, 4).nbytes == 8 * 2 * 2 * 4 * 4

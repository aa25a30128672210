"""Properties of whole models with any switches on, also together as no family has them."""

from __future__ import annotations

import array_api_strict
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import forward
from llama_layers.testing import assert_same_bits, configs
from llama_layers.verify import check, record, sites
from tests.support.random_models import model_of, random_weights

ANY = {"config": configs(max_heads=4), "seed": st.integers(0, 2**32 - 1)}


def drawn_ids(config, seed, count=5):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (2, count))


@given(**ANY)
def test_another_library_is_within_the_bounds(config, seed):
    """array-api-strict, which has no body but the definitions: each site, of NumPy's inputs."""
    weights, ids = random_weights(config, seed, np.float32), drawn_ids(config, seed)
    model = model_of(config, weights)
    strict = model_of(config, weights, array_api_strict.asarray)
    trace = record(strict, array_api_strict.asarray(ids))
    report = check(trace, model, explain=False)
    assert report.agrees, report.first
    assert not report.missing


@given(**ANY)
def test_sites_have_the_shapes_of_the_table(config, seed):
    model, ids = model_of(config, random_weights(config, seed)), drawn_ids(config, seed)
    sizes = {"B": 2, "S": 5, "T": 5}
    found = {}
    forward(model, ids, tap=lambda name, array: found.setdefault(name, array))
    known = {site.name: site for site in sites(config)}
    expected = [name for name, site in known.items() if not (site.pairwise or site.optional)]
    assert expected == list(found)
    for name, array in found.items():
        assert array.shape == tuple(sizes.get(size, size) for size in known[name].shape), name


@given(**ANY, what=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_what_is_not_finite_stays_in_its_text(config, seed, what):
    """It reaches all logits of its own token, and none of another text."""
    model = model_of(config, random_weights(config, seed))
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 5, config.hidden_size))
    clean = forward(model, inputs_embeds=x).logits
    place, channel = rng.integers(5), rng.integers(config.hidden_size)
    x[0, place, channel] = what
    with np.errstate(all="ignore"):
        found = forward(model, inputs_embeds=x).logits
    assert np.isnan(found[0, place]).all()
    assert_same_bits(found[1], clean[1])


@given(**ANY)
def test_queries_keys_and_values_differ(config, seed):
    """In every layer, where their weights do."""
    model, ids = model_of(config, random_weights(config, seed)), drawn_ids(config, seed)
    arrays = record(model, ids).arrays
    for layer in range(config.num_hidden_layers):
        q, k, v = (arrays[f"model.layers.{layer}.self_attn.{name}_proj"] for name in "qkv")
        width = k.shape[-1]
        for one, other in ((q[..., :width], k), (k, v), (q[..., :width], v)):
            assert (one != other).all()

"""Each family: random checkpoints of transformers' own class, loaded here, run and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llama_layers import KVCache, Llama, LlamaConfig, forward, load
from llama_layers.checkpoint import convert
from llama_layers.config.families import FAMILIES
from llama_layers.verify import check
from llama_layers.verify.recorders import record_transformers
from tests.support.families import CASES, opened, written

pytestmark = pytest.mark.peer

TOKENS = 40  # past the context length


@dataclass(frozen=True)
class Pair:
    """One checkpoint, in transformers and here."""

    directory: Path
    theirs: Any
    ours: Llama
    exact: Llama

    def theirs_on(self, ids: Any, **options: Any) -> Any:
        with torch.no_grad():
            return self.theirs(torch.from_numpy(ids), use_cache=False, **options).logits.numpy()

    @property
    def depends_on_length(self) -> bool:
        """Whether tokens fed later change how earlier ones would be rotated."""
        scaling = self.ours.config.rope_scaling
        return scaling is not None and scaling.depends_on_length

    def assert_rounded_as_well(self, logits: Any, theirs: Any, exact: Any) -> None:
        """Our error is at most 4 times theirs, or 4 ulps of the largest logit."""
        assert logits.dtype == np.float32
        assert exact.dtype == np.float64
        ulps = 4 * np.spacing(np.abs(exact).max().astype(np.float32))
        error, their_error = (np.abs(run - exact).max() for run in (logits, theirs))
        assert their_error < 1e-3 * np.abs(exact).max()
        assert error <= 4 * their_error + ulps


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each pair, made when first asked for."""
    made: dict[str, Pair] = {}

    def get(case: str) -> Pair:
        if case not in made:
            directory = written(tmp_path_factory.mktemp("family"), *CASES[case])
            made[case] = Pair(
                directory,
                opened(directory),
                load(directory),
                load(directory, dtype="float64"),
            )
        return made[case]

    return get


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest, pairs: Any) -> Pair:
    return pairs(request.param)


def in_chunks(model: Llama, ids: Any, cuts: list[int], mask: Any = None) -> Any:
    """The logits of a pass that is cut before some tokens."""
    cache, parts = KVCache.create(model, *ids.shape), []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        own = None if mask is None else mask[:, :stop]
        output = forward(model, ids[:, start:stop], cache=cache, attention_mask=own)
        parts.append(output.logits)
        cache = output.cache
    return np.concatenate(parts, axis=1)


def theirs_in_chunks(pair: Pair, ids: Any, cuts: list[int]) -> Any:
    """The logits of transformers, with a cache that keeps keys as they were rotated."""
    cache, parts = transformers.DynamicCache(config=pair.theirs.config), []
    for part in np.split(ids, cuts, axis=1):
        with torch.no_grad():
            output = pair.theirs(torch.from_numpy(part), cache=cache, use_cache=True)
        parts.append(output.logits.numpy())
    return np.concatenate(parts, axis=1)


def test_every_family_has_a_case():
    old = {"llama", "mistral", "qwen2", "qwen3"}  # in test_decoder_random.py
    assert {family for family, _ in CASES.values()} == set(FAMILIES) - old


def test_whole_in_chunks_and_token_by_token(pair, rng):
    ids = rng.integers(0, 61, (2, TOKENS))
    theirs, exact = pair.theirs_on(ids), forward(pair.exact, ids).logits
    for cuts in ([], [3, 17, 33], list(range(1, TOKENS))):
        if pair.depends_on_length:
            theirs, exact = theirs_in_chunks(pair, ids, cuts), in_chunks(pair.exact, ids, cuts)
        pair.assert_rounded_as_well(in_chunks(pair.ours, ids, cuts), theirs, exact)


def test_padding(pair, rng):
    ids = rng.integers(0, 61, (2, TOKENS))
    mask = np.ones((2, TOKENS), np.int64)
    mask[1, :7] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    theirs = pair.theirs_on(
        ids, attention_mask=torch.from_numpy(mask), position_ids=torch.from_numpy(positions)
    )
    cuts = [] if pair.depends_on_length else [11]
    exact, ours = (in_chunks(model, ids, cuts, mask) for model in (pair.exact, pair.ours))
    valid = mask.astype(bool)
    pair.assert_rounded_as_well(ours[valid], theirs[valid], exact[valid])


def test_vectors_instead_of_ids(pair, rng):
    x = rng.standard_normal((1, 5, 32)).astype(np.float32)
    with torch.no_grad():
        theirs = pair.theirs(inputs_embeds=torch.from_numpy(x)).logits.numpy()
    exact = forward(pair.exact, inputs_embeds=x.astype(np.float64)).logits
    pair.assert_rounded_as_well(forward(pair.ours, inputs_embeds=x).logits, theirs, exact)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_recorded_site_passes(pair, rng, dtype):
    in_float32 = dtype == "float32"  # as the pair is
    model = pair.theirs if in_float32 else opened(pair.directory, dtype)
    ids = rng.integers(0, 61, (2, 9))
    first = model.model.layers[0].self_attn
    trace = record_transformers(model, ids, probabilities=not hasattr(first, "sinks"))
    ours = pair.ours if in_float32 else load(pair.directory, dtype=dtype)
    report = check(trace, ours, profile="transformers")
    assert not report.failures, report
    assert {r.verdict for r in report.results if r.site.name in trace.arrays} <= {"PASS", "WARN"}
    assert {r.site.name for r in report.results} >= set(trace.arrays)


def test_transformers_reads_what_we_convert(pair, tmp_path, rng):
    directory = convert(pair.directory, tmp_path / "out")
    again = opened(directory)
    expected = pair.theirs.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    ids = torch.from_numpy(rng.integers(0, 61, (1, 17)))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, pair.theirs(ids).logits)


def test_a_model_in_memory(pair, rng):
    ids = rng.integers(0, 61, (1, 7))
    model = Llama.from_state_dict(pair.theirs.state_dict(), pair.theirs.config)
    expected = forward(pair.ours, ids).logits
    np.testing.assert_allclose(
        forward(model, torch.from_numpy(ids)).logits.numpy(), expected, atol=1e-4
    )


def test_the_config_is_written_as_it_was_read(pair):
    config = pair.ours.config
    assert LlamaConfig.from_json(config.to_json()) == config

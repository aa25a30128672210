"""A cache that is fed and changed, beside the tokens that its sequences should have by then."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import strategies as st

from llama_layers import KVCache, forward
from llama_layers.arrays.transfer import to_numpy
from tests.support.random_models import CONFIGS, model_of, random_weights

METHODS = (*["feed"] * 6, *["truncate"] * 4, "take", "repeat", "grow", "copy")


class Session:
    """Each method changes the cache and the tokens; logits are those of a pass without a cache."""

    def __init__(self, data, close, *, array, dtype):
        self.data, self.close, self.array = data, close, array
        self.window = data.draw(st.sampled_from([2, 3, 4, None]), label="window")
        self.rolling = self.window and data.draw(st.integers(1, 3), label="rolling")
        config = replace(CONFIGS["biases"], sliding_window=self.window, max_position_embeddings=64)
        weights = random_weights(config, dtype=dtype)
        self.model = model_of(config, weights, array)
        self.exact = model_of(config, {n: w.astype(np.float64) for n, w in weights.items()})
        self.max_len = data.draw(st.sampled_from([9, 5, 12, 3]), label="max_len")
        batch = data.draw(st.integers(1, 2), label="batch")
        self.cache = KVCache.create(self.model, batch, self.max_len, rolling=self.rolling)
        self.ids, self.keep = np.zeros((batch, 0), int), np.ones((batch, 0), bool)
        self.tokens = []  # a number for each slot, never used twice
        self.places = {}  # which of them a ring holds, by place
        self.made = 0
        self.old = None

    @property
    def capacity(self):
        if self.window is None:
            return self.max_len
        return min(self.max_len, self.window + self.rolling - 1)

    @property
    def most(self):
        return self.max_len if self.capacity == self.max_len else self.rolling

    def step(self):
        """Draw a method, and check what comes of it."""
        method = self.data.draw(st.sampled_from(METHODS), label="method")
        getattr(self, method)()
        assert int(self.cache.length) == len(self.tokens)
        assert (self.cache.max_len, self.cache.capacity) == (self.max_len, self.capacity)
        if self.cache.counts is not None:
            counts = to_numpy(self.cache.counts)
            np.testing.assert_array_equal(counts, self.keep.sum(axis=1))

    def feed(self):
        """Feed tokens; sometimes one too many, which leaves the cache as it is."""
        left = self.max_len - len(self.tokens)
        fits = min(self.most, left)
        counts = [*range(1, fits + 1)] * 3 + [fits + 1]
        count = self.data.draw(st.sampled_from(counts), label="count")
        seed, padded = self.data.draw(st.tuples(st.integers(0, 99), st.booleans()), label="ids")
        rng = np.random.default_rng(seed)
        ids = rng.integers(13, size=(len(self.ids), count))
        keep = rng.random(ids.shape) < 0.6 if padded else np.ones(ids.shape, bool)
        mask = self.array(keep) if padded else None
        if count > fits:
            with pytest.raises(ValueError, match=r"^cache: expected"):
                forward(self.model, self.array(ids), cache=self.cache, attention_mask=mask)
            return
        output = forward(self.model, self.array(ids), cache=self.cache, attention_mask=mask)
        self.cache = output.cache
        for slot in range(len(self.tokens), len(self.tokens) + count):
            self.made += 1
            self.tokens.append(self.made)
            self.places[slot % self.capacity] = self.made
        self.ids = np.concatenate([self.ids, ids], axis=1)
        self.keep = np.concatenate([self.keep, keep], axis=1)
        expected = forward(self.exact, self.ids, attention_mask=self.keep).logits
        self.close(to_numpy(output.logits)[keep], expected[:, -count:][keep])
        if self.old is not None:  # what is done to it must not matter
            ids = self.array(np.full((self.old.keys[0].shape[0], 1), 5))
            forward(self.model, ids, cache=self.old)
            self.old = None

    def truncate(self):
        gone = self.data.draw(st.sampled_from([1, 1, 2, 2, 3, 4, 99]), label="gone")
        length = max(0, len(self.tokens) - gone)
        seen = range(max(0, length - (self.window or length) + 1), length)
        if any(self.places[slot % self.capacity] != self.tokens[slot] for slot in seen):
            with pytest.raises(ValueError, match=r"^length: expected at least .* overwritten"):
                self.cache.truncate(length)
            return
        self.cache = self.cache.truncate(length)
        self.tokens = self.tokens[:length]
        self.ids, self.keep = self.ids[:, :length], self.keep[:, :length]

    def take(self):
        batch = len(self.ids)
        numbers = st.lists(st.integers(-batch, batch - 1), min_size=1, max_size=3)
        rows, listed = self.data.draw(st.tuples(numbers, st.booleans()), label="rows")
        self._left(self.cache.take(rows if listed else self.array(np.array(rows))))
        self.ids, self.keep = self.ids[rows], self.keep[rows]

    def repeat(self):
        n = self.data.draw(st.integers(1, 2), label="n")
        if len(self.ids) * n > 4:
            return
        self._left(self.cache.repeat(n))
        self.ids, self.keep = (np.repeat(a, n, axis=0) for a in (self.ids, self.keep))

    def grow(self):
        old = self.capacity
        self.max_len += self.data.draw(st.integers(0, 4), label="more")
        self.cache = self.cache.grow(self.max_len)
        if old < self.capacity:  # nothing can have been overwritten
            self.places = dict(enumerate(self.tokens))

    def copy(self):
        self._left(self.cache.copy())

    def _left(self, other):
        """Go on with another cache; the old one is still valid."""
        self.old = self.cache if len(self.tokens) < self.max_len else None
        self.cache = other

"""`sample`: filters against loops, frequencies against probabilities, the source of chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import sample
from llama_layers.arrays.transfer import to_numpy

# Upper 1e-4 points of the chi-square distribution, by degrees of freedom (NIST handbook, 1.3.6.7.4,
# has 18.467 for 4 at 0.001): P(chi2 > value) = 1e-4.
CHI_SQUARE = {1: 15.137, 2: 18.421, 3: 21.108, 4: 23.513, 5: 25.745, 6: 27.856, 7: 29.878}


def probabilities(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Of one row, by loops over sorted tokens; equal logits in the order of their ids."""
    largest = max(logits)
    weights = [math.exp((logit - largest) / temperature) for logit in logits]
    kept = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if top_k is not None and top_k < len(kept):
        smallest = logits[kept[top_k - 1]]
        kept = [i for i in kept if logits[i] >= smallest]
    if top_p is not None:
        total, reached, enough = math.fsum(weights[i] for i in kept), 0.0, []
        for i in kept:
            enough.append(i)
            reached += weights[i]
            if reached >= top_p * total:
                break
        kept = enough
    if min_p is not None:
        likeliest = max(weights[i] for i in kept)
        kept = [i for i in kept if weights[i] >= min_p * likeliest]
    total = math.fsum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


def assert_drawn_from(counts, expected):
    """No id of probability 0, and the others as often as chance allows once in 10**4 seeds."""
    draws = sum(counts)
    possible = [i for i, p in enumerate(expected) if p > 0]
    assert all(counts[i] == 0 for i, p in enumerate(expected) if p == 0), counts
    if len(possible) == 1:
        return
    assert all(draws * expected[i] >= 5 for i in possible), "too few draws for chi-square"
    chi_square = sum(
        (counts[i] - draws * expected[i]) ** 2 / (draws * expected[i]) for i in possible
    )
    assert chi_square < CHI_SQUARE[len(possible) - 1], (chi_square, counts)


LOGITS = [1.0, 0.2, -0.5, 1.0, 0.9, -1.5, 0.0]
FILTERS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 2},
    {"top_k": 3},
    {"top_k": 99},
    {"top_p": 0.1},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 1.0},
    {"min_p": 0.0},
    {"min_p": 0.5},
    {"min_p": 1.0},
    {"temperature": 2.0, "top_k": 5, "top_p": 0.8, "min_p": 0.6},
    {"top_k": 3, "top_p": 0.7},
    {"top_p": 0.6, "min_p": 0.95},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_frequencies(options, seed):
    logits = np.tile(np.array(LOGITS), (4000, 1))
    ids = sample(logits, **options, rng=seed)
    counts = np.bincount(ids, minlength=7).tolist()
    assert_drawn_from(counts, probabilities(LOGITS, **options))


# Logits closer than rounding may come in either order.
ORDINARY = st.integers(-4000, 4000).map(lambda number: number / 1000)


@given(
    logits=st.lists(
        st.sampled_from([0.0, 0.5, 1.0, 2.0, -math.inf]) | ORDINARY, min_size=1, max_size=8
    ).filter(lambda values: max(values) > -math.inf),
    top_k=st.none() | st.integers(1, 9),
    top_p=st.none() | st.floats(0.01, 1.0),
    min_p=st.none() | st.floats(0.0, 1.0),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_ids_are_those_of_the_naive_filters(logits, top_k, top_p, min_p, temperature):
    """The ids drawn by 300 rows: none that is filtered out, and each that is likely."""
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    # A sum on the very edge of top_p may round to either side of it.
    low, high = (
        probabilities(logits, **options | ({} if top_p is None else {"top_p": edge}))
        for edge in ((top_p or 1) * (1 - 1e-12), min(1.0, (top_p or 1) * (1 + 1e-12)))
    )
    drawn = set(sample(np.tile(np.array(logits), (300, 1)), **options, rng=0).tolist())
    assert drawn <= {i for i, p in enumerate(high) if p > 0}
    # Missed once in 10**13: (1 - 0.1)**300.
    assert drawn >= {i for i, p in enumerate(low) if p > 0.1}


class Fixed(np.random.Generator):
    """A generator that draws given numbers."""

    def __new__(cls, *numbers):
        self = super().__new__(cls, np.random.PCG64())
        self.numbers = numbers
        return self

    def __init__(self, *numbers):
        super().__init__(np.random.PCG64())

    def random(self, size):
        return np.array(self.numbers, float).reshape(size)


def test_each_number_drawn_stands_for_its_share():
    """Of probabilities 1/2, 1/4, 0 and 1/4 in the order of ids: where the shares begin and end."""
    logits = np.log(np.array([0.5, 0.25, 1.0, 0.25]))
    logits[2] = -np.inf
    numbers = [0.0, 0.49, 0.51, 0.74, 0.76, 1 - 2.0**-53]
    ids = sample(np.tile(logits, (6, 1)), rng=Fixed(*numbers))
    assert ids.tolist() == [0, 0, 1, 1, 3, 3]


def test_nothing_impossible_is_drawn_at_either_end():
    logits = np.array([[-np.inf, 0.0, -np.inf]] * 2)
    assert sample(logits, rng=Fixed(0.0, 1 - 2.0**-53)).tolist() == [1, 1]


@given(seed=st.integers(0, 2**32 - 1))
def test_greedy_is_the_first_of_the_largest(backend, seed):
    logits = np.random.default_rng(seed).integers(0, 4, size=(5, 6)).astype(np.float32)
    ids = sample(backend.array(logits), temperature=0)
    assert backend.holds(ids)
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert to_numpy(ids).tolist() == expected
    for temperature in (1e-3, 1e-300, 5e-324):  # overflows on the way to -inf, and is not greedy
        drawn = to_numpy(sample(backend.array(logits), temperature=temperature, rng=seed))
        assert all(row[i] == max(row) for row, i in zip(logits.tolist(), drawn, strict=True))


def test_greedy_with_infinities():
    logits = np.array([[-np.inf, -np.inf, 3.0], [0.0, np.inf, 1.0]])
    assert sample(logits, temperature=0).tolist() == [2, 1]


def test_shift_of_a_row_changes_nothing():
    logits = np.tile(np.array(LOGITS), (500, 1))
    for shift in (-1e5, 1e5):
        assert (sample(logits + shift, rng=3) == sample(logits, rng=3)).mean() > 0.99


def test_rng_is_the_only_randomness(backend):
    logits = backend.array(np.tile(np.array(LOGITS, np.float32), (50, 1)))

    def drawn(rng):
        ids = sample(logits, rng=rng)
        assert backend.holds(ids)
        return to_numpy(ids).tolist()

    # NumPy's global state neither matters nor changes.
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    assert drawn(5) == drawn(5) == drawn(np.random.default_rng(5))
    assert drawn(5) != drawn(6)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    generator = np.random.default_rng(5)
    assert drawn(generator) != drawn(generator)
    assert drawn(None) != drawn(None)


def test_same_ids_on_every_library(backend):
    logits = np.random.default_rng(0).standard_normal((50, 7)).astype(np.float32)
    ids = sample(backend.array(logits), temperature=0.8, top_p=0.9, rng=2)
    assert to_numpy(ids).tolist() == sample(logits, temperature=0.8, top_p=0.9, rng=2).tolist()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_format(dtype):
    logits = np.array([LOGITS] * 200).astype(dtype)
    wide = logits.astype(np.float64)
    assert sample(logits, rng=0).tolist() == sample(wide, rng=0).tolist()
    assert sample(logits, temperature=0).tolist() == [0] * 200


def test_rows_are_drawn_apart():
    logits = np.array([[0.0, -np.inf], [-np.inf, 0.0]] * 10)
    assert sample(logits, rng=0).tolist() == [0, 1] * 10
    ids = sample(np.zeros((200, 2)), rng=0)
    assert 50 < ids.sum() < 150  # not one draw for all rows


def test_no_rows():
    assert sample(np.zeros((0, 4)), rng=0).shape == (0,)
    assert sample(np.zeros((0, 4)), temperature=0).shape == (0,)


ROW = np.array([LOGITS])


@pytest.mark.parametrize(
    ("logits", "options", "error", "message"),
    [
        (ROW.tolist(), {}, TypeError, "logits: expected an array"),
        (ROW.astype(int), {}, TypeError, "logits: expected one of the dtypes"),
        (ROW[0], {}, ValueError, r"logits: expected shape \[B, vocab_size\], got \[7\]"),
        (ROW[:, :0], {}, ValueError, r"logits: expected shape \[B, vocab_size\], got \[1, 0\]"),
        (ROW * np.nan, {}, ValueError, "logits: expected numbers, got NaN"),
        (ROW * np.nan, {"temperature": 0}, ValueError, "logits: expected numbers, got NaN"),
        (ROW - np.inf, {}, ValueError, "logits: expected the largest of each row to be finite"),
        (ROW + np.inf, {}, ValueError, "logits: expected the largest of each row to be finite"),
        (ROW, {"temperature": -0.1}, ValueError, "temperature: expected a finite .* got -0.1"),
        (ROW, {"temperature": math.inf}, ValueError, "temperature: expected a finite .* got inf"),
        (ROW, {"temperature": math.nan}, ValueError, "temperature: expected a finite .* got nan"),
        (ROW, {"temperature": None}, TypeError, "temperature: expected a number, got NoneType"),
        (ROW, {"temperature": "1"}, TypeError, "temperature: expected a number, got str"),
        (ROW, {"temperature": True}, TypeError, "temperature: expected a number, got bool"),
        (ROW, {"top_k": 0}, ValueError, "top_k: expected a positive integer, got 0"),
        (ROW, {"top_k": 2.0}, ValueError, r"top_k: expected a positive integer, got 2\.0"),
        (ROW, {"top_k": True}, ValueError, "top_k: expected a positive integer, got True"),
        (ROW, {"top_p": "a"}, TypeError, "top_p: expected a number, got str"),
        (ROW, {"min_p": [0.1]}, TypeError, "min_p: expected a number, got list"),
        (ROW, {"rng": "a"}, TypeError, "rng: expected a numpy.random.Generator, .*, got 'a'"),
        (ROW, {"rng": 2.5}, TypeError, r"rng: expected a numpy.random.Generator, .*, got 2\.5"),
        (ROW, {"rng": True}, TypeError, "rng: expected a numpy.random.Generator, .*, got True"),
        (ROW, {"rng": -1}, ValueError, "rng: expected .* an integer, zero or more, .*, got -1"),
        (ROW, {"top_p": 0.0}, ValueError, "top_p: expected more than 0 and at most 1, got 0.0"),
        (ROW, {"top_p": 1.1}, ValueError, "top_p: expected more than 0 and at most 1, got 1.1"),
        (ROW, {"top_p": math.nan}, ValueError, "top_p: expected more than 0 .* got nan"),
        (ROW, {"min_p": -0.1}, ValueError, "min_p: expected 0 to 1, got -0.1"),
        (ROW, {"min_p": 1.5}, ValueError, "min_p: expected 0 to 1, got 1.5"),
    ],
)
def test_refuses(logits, options, error, message):
    with pytest.raises(error, match=message):
        sample(logits, **options)


def test_options_may_be_scalars_of_numpy():
    """An unsigned integer has no negative, which the largest logits are counted by."""
    logits = np.tile(ROW, (50, 1))
    plain = {"temperature": 0.5, "top_k": 3, "top_p": 0.75, "min_p": 0.25, "rng": 4}
    kinds = (np.float32, np.uint8, np.float16, np.float64, np.uint32)
    scalars = {name: kind(value) for (name, value), kind in zip(plain.items(), kinds, strict=True)}
    assert sample(logits, **scalars).tolist() == sample(logits, **plain).tolist()

"""How the texts of `generate` end, and what follows in a batch whose other texts go on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llama_layers import generate
from tests.support.random_models import CONFIGS, GQA, model_of, random_weights
from tests.test_generation import by_full_passes, generated


def uneven(rng, config=GQA):
    """A model, prompts, what follows without an end, and an id that rows reach at other steps."""
    model = model_of(config, random_weights(config))
    ids = rng.integers(13, size=(4, 3))
    endless = generated(model, ids, max_new_tokens=12, eos_token_id=())
    for eos in range(13):
        first = [row.index(eos) if eos in row else 12 for row in endless.tolist()]
        if len(set(first)) > 2 and max(first) < 12:
            return model, ids, endless, eos, first
    raise AssertionError("no id ends rows at three different steps")


@pytest.mark.parametrize("where", ["argument", "config", "one of two", "numpy"])
def test_eos_is_the_last_token_given(where, rng):
    model, ids, endless, eos, first = uneven(rng)
    config = replace(GQA, pad_token_id=12, eos_token_id=eos if where == "config" else None)
    model = replace(model, config=config)
    ends = {"argument": eos, "config": None, "one of two": (99, eos), "numpy": np.int64(eos)}
    computed = generated(model, ids, max_new_tokens=12, eos_token_id=ends[where])
    assert computed.shape[1] == max(first) + 1
    for row, end in enumerate(first):
        np.testing.assert_array_equal(computed[row, : end + 1], endless[row, : end + 1])
        assert (computed[row, end + 1 :] == 12).all()


@pytest.mark.parametrize(
    ("suggested", "stops"),
    [
        ("eos", True),
        (("other", "eos"), True),  # every id of a list ends a text
        ("other", False),  # and then those of config.json do not count
        (-1, False),  # none, as in some published files
        ((), False),
        (2**70, False),
        (None, True),
    ],
)
def test_ends_of_the_generation_config_go_before_those_of_the_config(suggested, stops, rng):
    model, ids, endless, eos, first = uneven(rng)
    unseen = next(i for i in range(13) if i not in endless)
    ids_by_name = {"eos": eos, "other": unseen}
    if isinstance(suggested, tuple):
        ends = [ids_by_name[name] for name in suggested]
    else:
        ends = ids_by_name.get(suggested, suggested)
    model = replace(
        model,
        config=replace(GQA, pad_token_id=12, eos_token_id=eos),
        generation_config={"eos_token_id": ends},
    )
    computed = generated(model, ids, max_new_tokens=12)
    assert computed.shape[1] == (max(first) + 1 if stops else 12)
    assert generated(model, ids, max_new_tokens=12, eos_token_id=()).shape[1] == 12


def test_ends_of_the_generation_config_that_are_not_ids(rng):
    model = model_of(GQA, random_weights(GQA))
    for end in ("2", 2.5, True, {}, [None]):
        with pytest.raises(ValueError, match="eos_token_id: expected token ids"):
            generate(
                replace(model, generation_config={"eos_token_id": end}),
                np.array([[1]]),
                max_new_tokens=1,
            )


def test_first_token_may_be_the_end(rng):
    model, ids, endless, _, _ = uneven(rng)
    computed = generated(model, ids[:1], max_new_tokens=9, eos_token_id=int(endless[0, 0]))
    np.testing.assert_array_equal(computed, endless[:1, :1])


def test_token_0_may_be_the_end():
    """0 is a token like others, and not the absence of one."""
    weights = random_weights(replace(GQA, vocab_size=2))
    weights["lm_head.weight"] *= 0  # a tie, which the first wins
    model = model_of(replace(GQA, vocab_size=2), weights)
    for eos in (0, np.int64(0), (0,)):
        assert generated(model, np.array([[1]]), max_new_tokens=4, eos_token_id=eos).tolist() == [
            [0]
        ]
    model = replace(model, config=replace(model.config, eos_token_id=0))
    assert generated(model, np.array([[1]]), max_new_tokens=4).tolist() == [[0]]
    endless = generated(model, np.array([[1]]), max_new_tokens=4, eos_token_id=())
    assert endless.tolist() == [[0, 0, 0, 0]]


def test_eos_in_the_prompt_ends_nothing(rng):
    model, ids, endless, eos, first = uneven(rng)
    row = int(np.argmax(first))
    prompt = np.concatenate([ids[row], endless[row, : first[row] + 1]])[None]
    computed = generated(model, prompt, max_new_tokens=1, eos_token_id=eos)
    np.testing.assert_array_equal(computed, by_full_passes(model, prompt, 1, temperature=0.0))


def test_other_rows_go_on_after_one_has_ended(rng):
    """What stands in an ended row changes no other."""
    model, ids, endless, eos, first = uneven(rng)
    longest = int(np.argmax(first))
    for padding in (None, 0, 5, -1, 13):  # the last two are not tokens, and stand for none
        other = replace(model, config=replace(GQA, pad_token_id=padding))
        computed = generated(other, ids, max_new_tokens=12, eos_token_id=eos)
        np.testing.assert_array_equal(computed[longest], endless[longest, : computed.shape[1]])


def test_a_row_that_has_ended_is_padded_without_a_padding_id():
    """The end token stands in for padding that the config does not name."""
    model = model_of(
        replace(CONFIGS["gqa"], pad_token_id=None, eos_token_id=None),
        random_weights(CONFIGS["gqa"]),
    )
    ids = np.array([[1, 2, 3], [3, 1, 2]])
    options = {"max_new_tokens": 8, "temperature": 5.0, "rng": 0}
    free = np.stack(list(generate(model, ids, **options)), axis=1)
    end = next(int(token) for token in free[0, :4] if token not in free[1])
    rows = np.stack(list(generate(model, ids, eos_token_id=end, **options)), axis=1)
    stop = int(np.argmax(free[0] == end))
    assert rows[0, : stop + 1].tolist() == free[0, : stop + 1].tolist()
    assert rows.shape[1] > stop + 2
    assert (rows[0, stop:] == end).all()

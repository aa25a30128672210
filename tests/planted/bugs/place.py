"""Bugs in what is said of where a site is wrong, and of habits beside mistakes."""

from __future__ import annotations

import numpy as np

from llama_layers.layers.sites import sites
from tests.planted.planting import wrong

PLACE = "verify/test_place.py::"
LOCAL = f"{PLACE}test_a_local_fault_is_told_by_its_place"
HABITS = "verify/test_diagnosis.py::"
BOTH = f"{HABITS}test_where_a_mistake_and_a_habit_fit_both_are_said"


@wrong(
    "llama_layers.verify.place:_stands_out",
    f"{PLACE}test_errors_that_fade_from_place_to_place_are_not_local",
)
def errors_elsewhere_not_looked_at(right, few, usual):
    return True


@wrong(
    "llama_layers.verify.place:_told", f"{LOCAL}[mlp.down_proj-wrong0-40-output channel 500 only]"
)
def channels_forgotten(right, marginals):
    return [m for m in right(marginals) if m.extent.axis != "output channel"]


@wrong("llama_layers.verify.place:_elements", LOCAL)
def scattered_elements_told_as_a_box(right, marked, count, shape):
    return []


@wrong(
    "llama_layers.verify.extent:_surprise",
    f"{PLACE}test_chance_does_not_hide_that_a_fault_is_everywhere[5.0]",
)
def chance_not_allowed_for(right, found, size, step, share, count):
    return True


@wrong(
    "llama_layers.verify.place:marginal",
    f"{PLACE}test_the_first_token_could_not_be_wrong_after_rope",
)
def the_first_token_counted_where_it_is_always_right(right, *args, spares_first, **options):
    return right(*args, **options)


@wrong("llama_layers.verify.extent:Marginal.reaches_end", LOCAL)
def a_tail_taken_for_a_run(right, self):
    return False


@wrong("llama_layers.verify.place_words:_guesses", LOCAL)
def the_second_half_of_a_head_called_the_first(right, m, shared, width):
    return [guess.replace("first half", "second half") for guess in right(m, shared, width)]


@wrong("llama_layers.verify.place_words:_ordinal", LOCAL)
def every_number_with_th(right, number):
    return f"{number}th"


@wrong(
    "llama_layers.verify.place_words:_most", f"{PLACE}test_a_fault_nearly_everywhere_is_not_local"
)
def what_is_right_not_said(right, told, few):
    return iter(())


@wrong(
    "llama_layers.verify.habits:said_of_both",
    BOTH,
)
def a_habit_not_said_beside_a_mistake(right, result, habit):
    return result


@wrong(
    "llama_layers.verify.habits:with_mistakes",
    BOTH,
)
def a_mistake_not_said_beside_a_habit(right, note, found):
    return note


@wrong("llama_layers.verify.habits:Habits.is_rare", f"{HABITS}test_a_habit_shows_in_most_layers")
def a_habit_of_one_layer_taken_for_usual(right, self, result):
    return False


@wrong(
    "llama_layers.verify.look:Sites._is_stated",
    f"{HABITS}test_a_habit_of_the_engine_that_the_trace_names_passes",
)
def the_engine_of_a_trace_not_read(right, self, profile):
    return False


@wrong(
    "llama_layers.verify.localised:counted_as",
    "verify/test_named_places.py::test_where_a_mistake_shows_is_said",
)
def the_number_after_the_last_is_said(right, what, numbers):
    return right(what, numbers + 1)


@wrong(
    "llama_layers.verify.look:_overflowed",
    "verify/test_unbounded.py::TestNotANumber::test_overflow_is_told",
)
def overflow_not_seen(right, failing):
    return 0


@wrong("llama_layers.verify.look:_excuses_worst", "verify/test_profiles.py::test_named[norm]")
def no_rounding_of_a_product_excused(right, failing, formats):
    return False


@wrong(
    "llama_layers.verify.failing_site:FailingSite.streams",
    "verify/test_diagnose.py::test_zeros_at_another_site_explain_nothing",
)
def zeros_offered_for_an_input(right, self, shape):
    yield from right(self, shape)
    for site in sites(self.config):
        array = self.array(site.name)
        if array is not None and array.size == np.prod(shape) and not array.any():
            yield site.name, array.reshape(shape)


@wrong(
    "llama_layers.verify.failing_site:FailingSite.array",
    "verify/test_diagnose.py::test_where_nan_begins",
)
def NaN_of_one_site_explain_those_of_another(right, self, name):
    found = right(self, name)
    return found if found is None else self.recorded.array(name)[:, -found.shape[1] :]

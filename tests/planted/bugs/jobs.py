"""Bugs in how a check is cut into jobs."""

from __future__ import annotations

from functools import partial

from llama_layers.verify.stored import StoredArray, info_of
from tests.planted.planting import wrong

SAME = "verify/test_jobs.py::test_the_report_is_that_of_a_serial_check"
ONE_LAYER = "verify/test_jobs.py::test_a_worker_reads_a_layer_and_keeps_none"


@wrong("llama_layers.verify.jobs:_parts", SAME)
def a_job_for_each_layer_though_its_input_is_missing(right, recorded):
    return ((site,) for part in right(recorded) for site in part)


@wrong("llama_layers.verify.jobs:copy", ONE_LAYER)
def layers_kept_from_job_to_job(right, weights):
    return weights


@wrong(
    "llama_layers.verify.stored:stored",
    "verify/test_jobs.py::test_a_job_is_small_and_the_head_comes_first",
)
def all_arrays_sent_with_each_job(right, arrays, name):
    return StoredArray(partial(info_of, arrays, name), partial(arrays.__getitem__, name))

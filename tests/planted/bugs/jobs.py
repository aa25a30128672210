"""Bugs in how a check is cut into jobs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from llama_layers.verify.stored import StoredArray, info_of
from tests.planted.planting import wrong

TOGETHER = "verify/test_jobs.py::test_layers_whose_input_is_missing_are_one_job"
ONE_LAYER = "verify/test_jobs.py::test_a_worker_reads_a_layer_and_keeps_none"


@wrong("llama_layers.verify.jobs:_parts", TOGETHER)
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


@wrong("llama_layers.verify.jobs:_Job.of", TOGETHER)
def inputs_left_behind(right, cls, part, judged, model):
    job = right(cls, part, judged, model)
    recorded = {site.name for site in part if site.name in job.arrays}
    inputs = {n for site in part if site.name in recorded for r in site.routes for n in r}
    arrays = {n: a for n, a in job.arrays.items() if n in recorded | inputs}
    return replace(job, arrays=arrays)

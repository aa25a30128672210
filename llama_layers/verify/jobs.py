"""Sites looked at by several workers: each layer of a trace is a job that needs no other."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

from llama_layers.layers.sites import Site, sites
from llama_layers.model.llama import Llama
from llama_layers.verify.look import Asked, Look, Sites
from llama_layers.verify.stored import StoredArray, StoredArrays, stored
from llama_layers.verify.validate import Recorded


def looks(judged: Sites, executor: Executor | None) -> Iterator[Look]:
    """Look at each recorded site, in the order of a forward pass."""
    recorded = judged.recorded
    if executor is None:
        every = sites(recorded.config)
        yield from (judged.look(site) for site in every if site.name in recorded.arrays)
        return
    parts = list(_parts(recorded))
    # A worker has no use for the tokenizer.
    model = pickle.dumps(replace(judged.model, open_tokenizer=None))
    jobs = {part: _Job.of(part, judged, model) for part in parts}
    # The head may take as long as several layers: it must not be the last to begin.
    first = sorted(parts, key=lambda part: part[-1].layer is not None)
    futures = {part: executor.submit(jobs[part].looks) for part in first}
    try:
        for part in parts:
            yield from futures.pop(part).result()
    finally:
        for future in futures.values():
            future.cancel()


def check_executor(executor: object) -> None:
    """Raise TypeError unless jobs can be given to an executor, or it is None."""
    wrong = isinstance(executor, type) or not callable(getattr(executor, "submit", None))
    if executor is not None and wrong:
        kind = type(executor).__name__
        got = f"the class {executor.__name__}" if isinstance(executor, type) else kind
        raise TypeError(f"executor: expected one of concurrent.futures, got {got}")


@dataclass(frozen=True)
class _Job:
    """Some sites of a trace, as they are sent to a worker, with what they are computed from."""

    part: tuple[Site, ...]  # recorded or not
    asked: Asked
    model: bytes
    recorded: Recorded  # without the arrays of other sites
    arrays: Mapping[str, StoredArray]

    @classmethod
    def of(cls, part: tuple[Site, ...], judged: Sites, model: bytes) -> _Job:
        """The job of looking at some sites."""
        recorded = judged.recorded
        inputs = {name for site in part for route in site.routes for name in route}
        names = inputs.union(site.name for site in part) & recorded.arrays.keys()
        arrays = {name: stored(recorded.arrays, name) for name in names}
        parts = {name: recorded.parts[name] for name in names & recorded.parts.keys()}
        past = replace(recorded.past, arrays=recorded.past.of_layers({s.layer for s in part}))
        without = replace(recorded, arrays={}, parts=parts, places={}, past=past)
        return cls(part, judged.asked, model, without, arrays)

    def looks(self) -> list[Look]:
        """Look at the sites, in a worker; evidence is too large to be sent back."""
        recorded = replace(self.recorded, arrays=StoredArrays(self.arrays))
        opened = opened_once(self.model)
        model = replace(opened, weights=copy(opened.weights))  # a copy keeps what is read by it
        judged = Sites(recorded, model, self.asked)
        present = (site for site in self.part if site.name in self.arrays)
        return [replace(judged.look(site), evidence=None) for site in present]


@lru_cache(maxsize=1)
def opened_once(model: bytes) -> Llama:
    """A model from its pickle, opened once by each worker."""
    return pickle.loads(model)


def _parts(recorded: Recorded) -> Iterator[tuple[Site, ...]]:
    """All sites, cut where a layer begins whose input was recorded: nothing crosses a cut."""
    part: list[Site] = []
    for _, of_layer in groupby(sites(recorded.config), key=lambda site: site.layer):
        first, *others = of_layer
        if part and recorded.route(first) is not None:
            yield tuple(part)
            part = []
        part += (first, *others)
    yield tuple(part)

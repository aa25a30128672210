"""An executor whose workers are here, and what their reports must equal."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import Executor, Future
from dataclasses import replace

from llama_layers.verify import to_html


class Remote(Executor):
    """Runs jobs here, from the last to the first, with what a worker would get and give."""

    def __init__(self):
        self.sent, self.waiting = [], []

    def submit(self, job, /):
        self.sent.append(pickle.dumps(job))
        future = _Lazy(self)
        self.waiting.append((future, self.sent[-1]))
        return future

    def run(self):
        while self.waiting:
            future, job = self.waiting.pop()
            future.set_result(pickle.loads(pickle.dumps(pickle.loads(job)())))


class _Lazy(Future):
    def __init__(self, executor):
        super().__init__()
        self.executor = executor

    def result(self):
        self.executor.run()
        return super().result()


def same(serial, parallel):
    """Two reports, but for the time that they took, in every form."""
    a, b = (replace(report, seconds=0.0) for report in (serial, parallel))
    assert json.dumps(a.to_json()) == json.dumps(b.to_json())
    assert a.text(every=True) == b.text(every=True)
    assert to_html(a) == to_html(b)

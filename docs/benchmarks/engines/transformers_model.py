"""Whole models in transformers: its own classes, with our weights, sdpa and a DynamicCache."""

from __future__ import annotations

import copy
import importlib
import inspect
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.bench.engine import Call, Engine, drawing_engine, model_engine
from llama_layers.bench.job import ModelJob
from llama_layers.errors import BackendError

from .torch_arrays import tensor, to_numpy


def engine(job: ModelJob, threads: int, closing: ExitStack) -> Engine:
    """The model of the job."""
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(threads)
    runner = Model(job, torch)
    return drawing_engine(runner, job) if job.draws else model_engine(runner, job)


class Model:
    """The model where the weights are, which on a GPU it shares with us."""

    name = "transformers"

    def __init__(self, job: ModelJob, torch: Any) -> None:
        self.torch = torch
        self.transformers: Any = importlib.import_module("transformers")
        self.numbers = f"{job.dtype} throughout"
        config = self.transformers.AutoConfig.for_model(**job.config.to_json())
        with torch.device("meta"):  # its own random numbers would take minutes to draw
            self.model = self.transformers.AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, job.dtype), attn_implementation="sdpa"
            )
        state = {name: tensor(array) for name, array in job.model.weights.named().items()}
        unknown = self.model.load_state_dict(state, strict=False, assign=True).unexpected_keys
        self.model.tie_weights()
        self.device = state["model.norm.weight"].device
        rotary = self.model.model.rotary_emb  # whose frequencies are in no state
        self.model.model.rotary_emb = type(rotary)(config).to(self.device)
        left = [name for name, parameter in self.model.named_parameters() if parameter.is_meta]
        if unknown or left:
            raise BackendError(
                f"transformers: expected just our parameters, got {unknown} too many and "
                f"{left} too few"
            )
        self.model.eval()
        parameters = inspect.signature(self.model.forward).parameters
        self.cache = "cache" if "cache" in parameters else "past_key_values"  # before 5.24

    def start(self, length: int) -> Any:
        """An empty cache, which grows."""
        return self.transformers.DynamicCache(config=self.model.config)

    def copy(self, state: Any) -> Any:
        """A cache that can be fed without a change to this one: each token makes new tensors."""
        copied = copy.copy(state)
        copied.layers = [copy.copy(layer) for layer in state.layers]
        return copied

    def feed(self, state: Any, ids: NDArray[np.int64]) -> tuple[Any, Any]:
        """Run tokens [B, S]; the logits of the last ones, and the cache with all of them."""
        with self.torch.inference_mode():
            return self.passed(self.model, state, self.torch.from_numpy(ids).to(self.device))

    def draw(self, state: Any, ids: NDArray[np.int64], count: int) -> Call:
        """From the last tokens [B, 1] before; each call draws the likeliest and feeds them."""
        logits, state = self.feed(state, ids)

        def step() -> None:
            """Draw one and feed it."""
            nonlocal logits, state
            with self.torch.inference_mode():
                logits, state = self.passed(self.model, state, logits[:, -1].argmax(-1)[:, None])

        return step

    def passed(self, model: Any, state: Any, ids: Any) -> tuple[Any, Any]:
        """One pass of a model, or of what was compiled of it."""
        output = model(ids, **{self.cache: state}, use_cache=True, logits_to_keep=1)
        return output.logits, state  # which has changed

    def to_numpy(self, logits: Any) -> NDArray[Any]:
        """The numbers of logits."""
        return to_numpy(logits)

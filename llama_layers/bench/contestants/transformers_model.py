"""Whole models in transformers: its own classes, with our weights, sdpa and a DynamicCache."""

from __future__ import annotations

import copy
import importlib
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.bench.contestants.contestant import Contestant, model_contestant
from llama_layers.bench.contestants.torch_arrays import tensor, to_numpy
from llama_layers.bench.job import ModelJob
from llama_layers.bench.named import named_arrays
from llama_layers.errors import BackendError


def contestant(job: ModelJob, threads: int, closing: ExitStack) -> Contestant:
    """The model of the job."""
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(threads)
    return model_contestant(_Model(job, torch), job)


class _Model:
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
        state = {name: tensor(array) for name, array in named_arrays(job.model)}
        unknown = self.model.load_state_dict(state, strict=False, assign=True).unexpected_keys
        self.model.tie_weights()
        rotary = self.model.model.rotary_emb  # whose frequencies are in no state
        self.model.model.rotary_emb = type(rotary)(config)
        left = [name for name, parameter in self.model.named_parameters() if parameter.is_meta]
        if unknown or left:
            raise BackendError(
                f"transformers: expected just our parameters, got {unknown} too many and "
                f"{left} too few"
            )
        self.model.eval()

    def start(self, length: int) -> Any:
        return self.transformers.DynamicCache(config=self.model.config)

    def copy(self, state: Any) -> Any:
        return copy.deepcopy(state)

    def feed(self, state: Any, ids: NDArray[np.int64]) -> tuple[Any, Any]:
        with self.torch.inference_mode():
            output = self.model(
                self.torch.from_numpy(ids), past_key_values=state, use_cache=True, logits_to_keep=1
            )
        return output.logits, output.past_key_values

    def to_numpy(self, logits: Any) -> NDArray[Any]:
        return to_numpy(logits)

"""Record what docs/logprobs.md reads: SmolLM2 135M in transformers, in bfloat16.

python docs/logprobs/record.py, with torch 2.13.0 and transformers 5.x installed. The versions that
the arrays were made with are in their metadata.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from llama_layers import load
from llama_layers.checkpoint import cached_path
from llama_layers.verify.recorders import record_transformers

TEXT = "Marie Curie was born in Warsaw, and won the Nobel Prize in physics in 1903."
KEPT = ("model.layers.14", "model.layers.29", "model.norm")


def main() -> None:
    """Run the model on the text, and keep a few layers' outputs and the log-probabilities."""
    ids = torch.tensor([load("smollm2-135m").tokenizer.encode(TEXT)])
    model = AutoModelForCausalLM.from_pretrained(
        cached_path("smollm2-135m"), dtype=torch.bfloat16
    ).eval()
    trace = record_transformers(model, ids)
    with torch.no_grad():
        logits = model(input_ids=ids).logits.float()  # as trainers do
    # The logits at position s are for token s + 1.
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    arrays = {name: trace.arrays[name] for name in KEPT} | {"logprobs": logprobs.numpy()}
    said = {"torch": torch.__version__, **trace.metadata}
    kept = replace(trace, arrays=arrays, attention_mask=None, metadata=said)
    kept.save(Path(__file__).with_name("rollout.safetensors"), force=True)


if __name__ == "__main__":
    main()

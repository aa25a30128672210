"""Trials of bodies on small inputs, where they have to keep to the bounds of their definitions.

operations.py has the cases of each operation, decoding.py those of whole models. They stand above
everything that they try; backends/trust.py loads them by name before a body first serves.
"""

from llama_layers.trial.one_body import OPERATIONS, try_body

__all__ = ["OPERATIONS", "try_body"]

"""Bodies held to the bounds of their definitions, on small inputs.

Each operation has its cases in operations.py, decoding in decoding.py. They stand above all that
they try: the dispatcher, far below, loads them by name the first time that a body is to serve.
"""

from llama_layers.verify.bodies.trial import OPERATIONS, verdict_on

__all__ = ["OPERATIONS", "verdict_on"]

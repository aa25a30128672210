"""Faster bodies of the definitions, for arrays of one library.

Each library's package lists them in its ``ROUTES``, the fastest route first: numpy (whose first
route is numba), cupy and jax. ``llama-layers info --verify`` shows those of this machine.
"""

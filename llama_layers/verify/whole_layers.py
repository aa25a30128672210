"""Layers that were not run, or run with the weights of others."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from llama_layers.arrays.transfer import to_numpy
from llama_layers.layers.sites import Site, sites
from llama_layers.model.llama import Llama
from llama_layers.verify.build import matrix
from llama_layers.verify.operations import Linear, Norm, Operation, Residual
from llama_layers.verify.recompute import Change
from llama_layers.verify.validate import Recorded


def left_out(layers: Collection[int]) -> Change:
    """Layers that pass on what goes in."""

    def change(site: Site, operation: Operation, known: Recorded) -> Operation:
        if isinstance(operation, Residual) and site.layer in layers:
            return replace(operation, added=np.zeros_like(operation.added))
        return operation

    return change


def weights_of(model: Llama, layer: int, other: int) -> Change:
    """A layer with the weights of another."""
    twins = {site.role: site for site in sites(model.config) if site.layer == other}

    def change(site: Site, operation: Operation, known: Recorded) -> Operation:
        if site.layer == layer and isinstance(operation, Norm):
            return replace(operation, weight=to_numpy(matrix(twins[site.role], model)[0]))
        if site.layer == layer and isinstance(operation, Linear):
            weight, bias = matrix(twins[site.role], model)
            return replace(
                operation, weight=to_numpy(weight), bias=None if bias is None else to_numpy(bias)
            )
        return operation

    return change

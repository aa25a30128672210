"""Whether named tensors are those of a config, and what to say if they are not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

from llama_layers.config.llama_config import LlamaConfig
from llama_layers.model.tensor_names import EMBEDDING, HEAD, expected_tensors, layer_arrays

_BASE = "model."
# Modules that wrap others, as torch.compile's _orig_mod does: private names, which no layer has.
_WRAPPER = re.compile(r"(?:^|(?<=\.))_\w+\.")
# Buffers that exporters save and transformers' classes do not read. What RoPE and masks need
# follows from the config, and a scale of keys or values is for caches of 8 bits.
_INERT = re.compile(
    r"(.*\.)?("
    r"rotary_emb\.\w+|rope\.freqs|freqs_cis|cos_cached|sin_cached|masked_bias|"
    r"self_attn\.(\w+\.)?(k|v|kv)_scale"
    r")"
)


def is_inert(name: str) -> bool:
    """Whether a tensor of that name changes no number of the model."""
    return _INERT.fullmatch(name) is not None


def misfit(
    shapes: Mapping[str, tuple[int, ...]],
    config: LlamaConfig,
    stored_names: Mapping[str, str] | None = None,
) -> str | None:
    """Say how tensors differ from the `expected_tensors` of a config; None if they do not.

    Shapes are by Hugging Face name, without those of ignored tensors. `stored_names` are the names
    in the file, if the tensors come from one.
    """
    expected = expected_tensors(config)
    missing = [name for name in expected if name not in shapes]
    if missing and (difference := _other_names(list(shapes), missing)) is not None:
        from_file = stored_names is not None
        return difference + (", or pass them renamed to Llama.from_state_dict" if from_file else "")
    extra = [(stored_names or {}).get(name, name) for name in shapes if name not in expected]
    misshapen = [
        f"{name} (expected {list(shape)}, got {list(shapes[name])})"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    lists = {"missing": missing, "unexpected": extra, "of another shape": misshapen}
    return "; ".join(_listed(kind, names) for kind, names in lists.items() if names) or None


def unfusible(dtypes: Mapping[str, str], layers: Iterable[int], model_type: str) -> str | None:
    """Say which tensors that become one array differ in dtype; None if none do."""
    for layer in layers:
        for together in layer_arrays(layer, model_type):
            names = [name for name in together if name in dtypes]
            if len({dtypes[name] for name in names}) > 1:
                found = ", ".join(dtypes[name] for name in names)
                return f"{', '.join(names)} are of different dtypes, {found}"
    return None


def _other_names(names: Sequence[str], missing: Sequence[str]) -> str | None:
    """Say how the names of all missing tensors differ from those expected, if in one way."""
    wanted = [name for name in missing if name != HEAD] or missing
    for difference, renamed in _renamings(names):
        found = {renamed(name): name for name in names}
        if all(name in found for name in wanted):
            headless = HEAD in missing and HEAD not in found
            return (
                f"the names {difference} ({found[wanted[0]]} for {wanted[0]})"
                + (f", and {HEAD} is missing" if headless else "")
                + ": rename the tensors"
            )
    return None


def _renamings(names: Sequence[str]) -> Iterator[tuple[str, Callable[[str], str]]]:
    """Ways in which names may differ from Hugging Face's, each with a function that undoes it."""
    wrapper = next((found for name in names if (found := _WRAPPER.search(name))), None)
    if wrapper is not None:
        yield f"contain {wrapper[0]!r}", partial(_WRAPPER.sub, "")
    table = EMBEDDING.removeprefix(_BASE)
    for name in islice((name for name in names if name.endswith(table)), 8):
        expected = EMBEDDING if name.endswith(EMBEDDING) else table
        prefix, own = name.removesuffix(expected), EMBEDDING.removesuffix(expected)
        words = f"carry the prefix {prefix!r}" + (f" instead of {own!r}" if own else "")
        yield words if prefix else f"lack the prefix {own!r}", partial(_with_prefix, own, prefix)


def _with_prefix(own: str, other: str, name: str) -> str:
    return own + name.removeprefix(other) if name.startswith(other) else name


def _listed(kind: str, names: Sequence[str], shown: int = 4) -> str:
    more = f", and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} {kind}: {', '.join(names[:shown])}{more}"

"""Whether named tensors are those of a config, and what to say if they are not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice

from llama_layers.config.families import FAMILIES
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.model.fused_tensors import FUSED, parts_of, tensors_in_files
from llama_layers.model.tensor_names import EMBEDDING, HEAD, expected_tensors, layer_arrays, renamed

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
    if missing and (difference := _other_names(list(shapes), missing, config)) is not None:
        from_file = stored_names is not None
        return difference + (", or pass them renamed to Llama.from_state_dict" if from_file else "")
    extra = [(stored_names or {}).get(name, name) for name in shapes if name not in expected]
    misshapen = [
        f"{name} (expected {list(shape)}, got {list(shapes[name])})"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    apart = _fused_elsewhere(extra, missing, config.model_type)
    missing = _as_fused(missing, config)
    lists = {"missing": missing, "unexpected": extra, "of another shape": misshapen}
    found = [_listed(kind, names) for kind, names in lists.items() if names]
    return "; ".join([*found, *apart]) or None


def unfusible(dtypes: Mapping[str, str], layers: Iterable[int], model_type: str) -> str | None:
    """Say which tensors that become one array differ in dtype; None if none do."""
    for layer in layers:
        for together in layer_arrays(layer, model_type):
            names = [name for name in together if name in dtypes]
            if len({dtypes[name] for name in names}) > 1:
                found = ", ".join(dtypes[name] for name in names)
                return f"{', '.join(names)} are of different dtypes, {found}"
    return None


def _in_files(config: LlamaConfig) -> dict[str, str]:
    """What the files of a family call each tensor, or the fused one that it is in."""
    modules = FAMILIES[config.model_type].stored_names
    return {
        part: (renamed(name, modules) or name)
        for name, parts in tensors_in_files(config).items()
        for part in parts
    }


def _as_fused(missing: Sequence[str], config: LlamaConfig) -> list[str]:
    """The missing tensors, the fused one where all that is in it is missing."""
    absent = set(missing)
    fused = {
        part: name
        for name, parts in tensors_in_files(config).items()
        for part in parts
        if absent.issuperset(parts)
    }
    return list(dict.fromkeys(fused.get(name, name) for name in missing))


def _fused_elsewhere(
    extra: Sequence[str], missing: Sequence[str], model_type: str
) -> Iterator[str]:
    """Say that a tensor has the rows of several that are missing, if another family fuses them."""
    for name in extra:
        if (parts := parts_of(name, FUSED)) and all(part in missing for part in parts):
            yield (
                f"{name} seems to hold the rows of {', '.join(parts)}, which files of {model_type} "
                f"have apart: split it, or name the family that it is of in model_type"
            )
            return


def _other_names(names: Sequence[str], missing: Sequence[str], config: LlamaConfig) -> str | None:
    """Say how the names of all missing tensors differ from those expected, if in one way."""
    wanted, files = [name for name in missing if name != HEAD] or missing, _in_files(config)
    tables = dict.fromkeys([EMBEDDING, files[EMBEDDING]])
    for difference, undone in chain(*(_renamings(names, table) for table in tables)):
        found = {undone(name): name for name in names}
        if all(name in found or files[name] in found for name in wanted):
            headless = HEAD in missing and HEAD not in found
            first = wanted[0] if wanted[0] in found else files[wanted[0]]
            return (
                f"the names {difference} ({found[first]} for {first})"
                + (f", and {HEAD} is missing" if headless else "")
                + ": rename the tensors"
            )
    return None


def _renamings(names: Sequence[str], whole: str) -> Iterator[tuple[str, Callable[[str], str]]]:
    """Ways in which names may differ from Hugging Face's, each with a function that undoes it.

    `whole` is the name of the embedding.
    """
    wrapper = next((found for name in names if (found := _WRAPPER.search(name))), None)
    if wrapper is not None:
        yield f"contain {wrapper[0]!r}", partial(_WRAPPER.sub, "")
    table = whole.partition(".")[2]
    for name in islice((name for name in names if name.endswith(table)), 8):
        expected = whole if name.endswith(whole) else table
        prefix, own = name.removesuffix(expected), whole.removesuffix(expected)
        words = f"carry the prefix {prefix!r}" + (f" instead of {own!r}" if own else "")
        yield words if prefix else f"lack the prefix {own!r}", partial(_with_prefix, own, prefix)


def _with_prefix(own: str, other: str, name: str) -> str:
    return own + name.removeprefix(other) if name.startswith(other) else name


def _listed(kind: str, names: Sequence[str], shown: int = 4) -> str:
    more = f", and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} {kind}: {', '.join(names[:shown])}{more}"

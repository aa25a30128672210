"""Traces of transformers' models, through hooks."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import Any

import numpy as np

from llama_layers.arrays.describe import describe
from llama_layers.arrays.dtypes import dtype_name
from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array, Device, Namespace
from llama_layers.config.families import FAMILIES, module_name
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.sites import Site, sites
from llama_layers.model.fused_tensors import FUSED
from llama_layers.verify.trace import Trace

# Families that have heads before tokens where they normalise queries and keys.
_HEADS_FIRST = frozenset({"exaone4", "gemma3_text", "hunyuan_v1_dense"})
Keep = Callable[[str, Array], None]


def record_transformers(
    model: Any,
    input_ids: Array,
    /,
    *,
    attention_mask: Array | None = None,
    positions: Array | None = None,
    cache: Any = None,
    probabilities: bool = False,
) -> Trace:
    """Run a model of transformers (5 or later) and keep the array of every site.

    Parameters
    ----------
    model : LlamaForCausalLM, or that class of another family that `load` reads
        In any dtype, on any device, with "eager", "sdpa" or any other attention. It is left as it
        was found, also if it fails, and runs in the mode that it is in: call ``model.eval()`` first
        if dropout is to be off.
    input_ids : tensor or array of integers, shape [B, S]
        Token ids.
    attention_mask : tensor or array of 0 and 1, shape [B, S], optional
        Which tokens are not padding; all if not given. With a past it has those tokens, too.
    positions : tensor or array of integers, shape [S] or [B, S], optional
        For RoPE; if not given transformers counts from 0, padding included.
    cache : DynamicCache, optional
        Keys and values of earlier tokens, as transformers returns them. They are recorded as
        ``self_attn.past_key`` and ``self_attn.past_value``; the cache itself is left as it is.
    probabilities : bool, optional
        Whether to keep the probabilities of attention too, which only "eager" has.

    Returns
    -------
    Trace
        With NumPy arrays, in the dtypes in which transformers computes them.

    Raises
    ------
    TypeError
        If `model` is not one of these.
    ValueError
        If an argument has a wrong shape or dtype, or probabilities are asked for where the
        attention function gives none.
    RuntimeError
        If a site was never seen: in a compiled model, say, or with layers of other code.

    Warns
    -----
    UserWarning
        If the model is training with dropout, which no engine repeats.

    Examples
    --------
    >>> from llama_layers import load
    >>> from llama_layers.verify import check
    >>> from llama_layers.verify.recorders import record_transformers
    >>> trace = record_transformers(peer, ids)  # doctest: +SKIP
    >>> check(trace, load("smollm2-135m")).agrees  # doctest: +SKIP
    True
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in FAMILIES or not hasattr(model, "lm_head"):
        raise TypeError(
            f"model: expected the causal language model of one of transformers' families "
            f"{', '.join(FAMILIES)}, got {type(model).__name__}"
        )
    ours = LlamaConfig.from_json(json.loads(config.to_json_string(use_diff=False)))
    torch = importlib.import_module("torch")
    ids = _integers(torch, "input_ids", input_ids, model.device)
    if ids.ndim != 2:
        raise ValueError(f"input_ids: expected shape [B, S], got {list(ids.shape)}")
    options: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    before = 0
    if cache is not None:
        if getattr(cache, "is_compileable", True):  # full of places without tokens
            raise ValueError(f"cache: expected a DynamicCache, got {type(cache).__name__}")
        before = int(cache.get_seq_length())
        known = inspect.signature(model.forward).parameters
        name = "cache" if "cache" in known else "past_key_values"  # until 5.40
        options |= {name: copy.deepcopy(cache), "use_cache": True}
    mask = None
    if attention_mask is not None:
        mask = _integers(torch, "attention_mask", attention_mask, model.device)
        expected = [ids.shape[0], before + ids.shape[1]]
        if list(mask.shape) != expected:
            raise ValueError(f"attention_mask: expected shape {expected}, got {list(mask.shape)}")
        options["attention_mask"] = mask
    if positions is not None:
        options["position_ids"] = _positions(torch, positions, ids)
        # Without a mask, a jump of the positions would begin another text in the same row.
        ones = torch.ones((ids.shape[0], before + ids.shape[1]), dtype=ids.dtype, device=ids.device)
        options.setdefault("attention_mask", ones)
    arrays: dict[str, np.ndarray] = {}
    places: list[Array] = []

    def keep(name: str, tensor: Array) -> None:
        arrays[name] = np.array(to_numpy(tensor))  # the tensor may be written over

    _warn_of_dropout(torch, model)
    with torch.no_grad(), _watched(model, ours, keep, places.append, probabilities):
        logits = model(**options).logits
    if (name := "logits") in {site.name for site in sites(ours)}:
        keep(name, logits)
    _check_complete(arrays, ours, probabilities)
    position_ids = to_numpy(places[0])
    # A layer with a window may have forgotten the first tokens.
    past = [array.shape[1] for name, array in arrays.items() if name.endswith("past_key")]
    seen = max(past, default=0) + ids.shape[1]
    dtypes = {dtype_name(array.dtype) for array in arrays.values()}
    return Trace(
        arrays,
        input_ids=to_numpy(ids),
        positions=position_ids[0] if len(position_ids) == 1 else position_ids,
        attention_mask=None if mask is None else to_numpy(mask)[:, -seen:] != 0,
        metadata={
            "engine": f"transformers {version('transformers')}",
            "attention": str(config._attn_implementation),
            "config": config.to_json_string(use_diff=False),
            **({"rope_layout": "interleaved"} if FAMILIES[config.model_type].interleaved else {}),
            # One for all arrays: a model in several dtypes, or under autocast, has none.
            **({"dtype": dtypes.pop()} if len(dtypes) == 1 else {}),
            **describe(torch, logits),
        },
    )


def _integers(torch: Namespace, name: str, values: Array, device: Device) -> Any:
    tensor = torch.as_tensor(values, device=device)
    if tensor.is_floating_point() or tensor.is_complex():
        raise ValueError(f"{name}: expected integers, got {dtype_name(tensor.dtype)}")
    return tensor.to(torch.int64)


def _positions(torch: Namespace, values: Array, ids: Any) -> Array:
    positions = _integers(torch, "positions", values, ids.device)
    if positions.shape not in (ids.shape, ids.shape[1:]):
        raise ValueError(
            f"positions: expected shape {list(ids.shape[1:])} or {list(ids.shape)}, "
            f"got {list(positions.shape)}"
        )
    return torch.atleast_2d(positions)


def _warn_of_dropout(torch: Namespace, model: Any) -> None:
    """Warn if the model is in training mode and drops numbers, so that no run is like another."""
    dropped = {
        f"{name or type(module).__name__} ({module.p:g})"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Dropout) and module.training and module.p > 0
    }
    rate = getattr(model.config, "attention_dropout", 0.0) or 0.0
    if rate > 0 and any(layer.self_attn.training for layer in model.model.layers):
        dropped.add(f"attention_dropout ({rate:g})")
    if dropped:
        warnings.warn(
            f"the model is in training mode with dropout, {', '.join(sorted(dropped)[:3])}, so its "
            "arrays are random and no check can pass: call model.eval() before recording",
            UserWarning,
            stacklevel=3,
        )


@contextmanager
def _watched(
    model: Any,
    config: LlamaConfig,
    keep: Keep,
    keep_positions: Callable[[Array], None],
    probabilities: bool,
) -> Iterator[None]:
    """Hook the modules and the attention function as long as the context is open."""
    with ExitStack() as stack:

        def output_of(module: Any, site: Site) -> None:
            def hook(_: object, __: object, output: Any) -> None:
                output = output[0] if isinstance(output, tuple) else output
                keep(site.name, _tokens_first(output, site, config))

            stack.callback(module.register_forward_hook(hook).remove)

        def input_of(module: Any, site: Site) -> None:
            def hook(_: object, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
                keep(site.name, _tokens_first([*inputs, *keywords.values()][0], site, config))

            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

        def part_of(module: Any, site: Site, parts: Mapping[str, str]) -> None:
            names = [role for role in parts if parts[role] == parts[site.role]]
            sizes = {s.role: int(s.shape[-1]) for s in sites(config) if s.role in names}
            start = sum(sizes[role] for role in names[: names.index(site.role)])

            def hook(_: object, __: object, output: Any) -> None:
                keep(site.name, output[..., start : start + sizes[site.role]])

            stack.callback(module.register_forward_hook(hook).remove)

        def positions(_: object, inputs: tuple[Array, ...], keywords: dict[str, Array]) -> None:
            keep_positions(keywords["position_ids"] if "position_ids" in keywords else inputs[1])

        body = model.model
        # Granite with windows has a table for each theta, and does not use the one for all.
        for table in getattr(body, "rotary_embs", None) or [body.rotary_emb]:
            stack.callback(table.register_forward_pre_hook(positions, with_kwargs=True).remove)
        inputs, fused = _modules_of_inputs(config), FAMILIES[config.model_type].fused
        parts = {part: module for module in fused for part in FUSED[module]}
        for site in sites(config):
            layer = f"model.layers.{site.layer}"
            if site.operation == "embedding":
                input_of(body.layers[0], site)  # multiplied outside the module, if at all
            elif site.role in inputs:
                input_of(model.get_submodule(f"{layer}.{inputs[site.role]}"), site)
            elif site.role in parts:
                part_of(model.get_submodule(f"{layer}.{parts[site.role]}"), site, parts)
            elif site.operation in ("norm", "linear") or site.role == "layer":
                output_of(model.get_submodule(site.name), site)
        rotated = not config.qk_norm_after_rope
        stack.enter_context(_attention_watched(model, keep, rotated, probabilities))
        yield


@contextmanager
def _attention_watched(
    model: Any, keep: Keep, rotated: bool, probabilities: bool
) -> Iterator[None]:
    """Keep what the attention function is given, and its probabilities.

    `rotated` says whether it is given queries and keys as RoPE leaves them.

    Keys and values are those of the cache, with the new ones last.

    The function is looked up by name at each call. For as long as the context is open, one that
    looks on stands under that name; other models than this one pass through it unseen.
    """
    functions = importlib.import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    chosen = model.config._attn_implementation
    attentions = [layer.self_attn for layer in model.model.layers]
    names = {id(module): f"model.layers.{i}.self_attn" for i, module in enumerate(attentions)}
    # "eager" is under no name, but in each family's own file.
    own = sys.modules[type(attentions[0]).__module__].eager_attention_forward
    function = functions.get(chosen, own)

    def attention(
        module: object, query: Any, key: Any, value: Any, *rest: Any, **options: Any
    ) -> Any:
        output, weights = function(module, query, key, value, *rest, **options)
        if (name := names.get(id(module))) is not None:
            past = key.shape[2] - query.shape[2]
            if rotated:
                keep(f"{name}.q_rope", query.transpose(1, 2))
                keep(f"{name}.k_rope", key[:, :, past:].transpose(1, 2))
            if past:
                keep(f"{name}.past_key", key[:, :, :past].transpose(1, 2))
                keep(f"{name}.past_value", value[:, :, :past].transpose(1, 2))
            if probabilities:
                if weights is None:
                    raise ValueError(
                        f"probabilities: expected a model with attention 'eager', got {chosen!r}"
                    )
                if getattr(module, "sinks", None) is not None:
                    raise ValueError(
                        "probabilities: expected False, since this attention does not give them: "
                        "its sink is left out and multiplied in afterwards"
                    )
                keep(f"{name}.probabilities", weights)
        return output, weights

    replaced = True
    try:
        del functions[chosen]  # someone's own, instead of the library's
    except KeyError:
        replaced = False
    functions[chosen] = attention
    try:
        yield
    finally:
        del functions[chosen]
        if replaced:
            functions[chosen] = function


def _modules_of_inputs(config: LlamaConfig) -> dict[str, str]:
    """The modules of a layer, by the roles of the sites that are their inputs."""
    found = {"self_attn.attention": "self_attn.o_proj", "mlp.act": "mlp.down_proj"}
    found["attention_residual"] = (
        module_name(config.model_type, "post_attention_layernorm") if config.norms_before else "mlp"
    )
    if config.qk_norm_after_rope:
        for letter in "qk":
            norm = module_name(config.model_type, f"self_attn.{letter}_norm")
            found[f"self_attn.{letter}_rope"] = norm
    return found


def _tokens_first(tensor: Any, site: Site, config: LlamaConfig) -> Any:
    """A tensor in the shape of a site, [B, S, heads, D] where that has heads."""
    if len(site.shape) != 4:
        return tensor
    if tensor.ndim == 4:
        return tensor.transpose(1, 2) if config.model_type in _HEADS_FIRST else tensor
    return tensor.unflatten(-1, (-1, config.head_dim))


def _check_complete(
    arrays: dict[str, np.ndarray], config: LlamaConfig, probabilities: bool
) -> None:
    for site in sites(config):
        asked = probabilities and site.role == "self_attn.probabilities"
        if site.name not in arrays and (asked or not site.optional):
            raise RuntimeError(
                f"{site.name}: never seen; expected transformers' own layers, not compiled and not "
                "replaced by kernels"
            )

"""Traces of transformers' models, through hooks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import Any

import numpy as np

from llama_layers.arrays.describe import describe
from llama_layers.arrays.dtypes import dtype_name
from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array, Device, Namespace
from llama_layers.verify.trace import Trace

_FAMILIES = ("llama", "mistral", "qwen2")
# Modules of a layer whose output is a site.
_OUTPUTS = """
input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj
post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj
""".split()
# Modules of a layer whose input is a site that has no module of its own.
_INPUTS = {
    "post_attention_layernorm": "attention_residual",
    "self_attn.o_proj": "self_attn.attention",
    "mlp.down_proj": "mlp.act",
}
Keep = Callable[[str, Array], None]


def record_transformers(
    model: Any,
    input_ids: Array,
    /,
    *,
    attention_mask: Array | None = None,
    positions: Array | None = None,
    probabilities: bool = False,
) -> Trace:
    """Run a model of transformers (5 or later) and keep the array of every site.

    Parameters
    ----------
    model : LlamaForCausalLM, MistralForCausalLM or Qwen2ForCausalLM
        In any dtype, on any device, with "eager", "sdpa" or any other attention. It is left as it
        was found, also if it fails.
    input_ids : tensor or array of integers, shape [B, S]
        Token ids.
    attention_mask : tensor or array of 0 and 1, shape [B, S], optional
        Which tokens are not padding; all if not given.
    positions : tensor or array of integers, shape [S] or [B, S], optional
        For RoPE; if not given transformers counts from 0, padding included.
    probabilities : bool, optional
        Whether to keep the probabilities of attention too, which only "eager" has.

    Returns
    -------
    Trace
        With NumPy arrays, in the dtypes in which transformers computes them.

    Raises
    ------
    TypeError
        If `model` is not one of the three.
    ValueError
        If an argument has a wrong shape or dtype, or probabilities are asked for where the
        attention function gives none.
    RuntimeError
        If a site was never seen: in a compiled model, say, or with layers of other code.

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
    if getattr(config, "model_type", None) not in _FAMILIES or not hasattr(model, "lm_head"):
        raise TypeError(
            "model: expected a LlamaForCausalLM, MistralForCausalLM or Qwen2ForCausalLM of "
            f"transformers, got {type(model).__name__}"
        )
    torch = importlib.import_module("torch")
    ids = _integers(torch, "input_ids", input_ids, model.device)
    if ids.ndim != 2:
        raise ValueError(f"input_ids: expected shape [B, S], got {list(ids.shape)}")
    options: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    mask = None
    if attention_mask is not None:
        mask = _integers(torch, "attention_mask", attention_mask, model.device)
        if mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask: expected shape {list(ids.shape)}, got {list(mask.shape)}"
            )
        options["attention_mask"] = mask
    if positions is not None:
        options["position_ids"] = _positions(torch, positions, ids)
        # Without a mask, a jump of the positions would begin another text in the same row.
        options.setdefault("attention_mask", torch.ones_like(ids))
    arrays: dict[str, np.ndarray] = {}
    places: list[Array] = []

    def keep(name: str, tensor: Array) -> None:
        arrays[name] = np.array(to_numpy(tensor))  # the tensor may be written over

    with torch.no_grad(), _watched(model, keep, places.append, probabilities), _evaluating(model):
        logits = model(**options).logits
    _check_complete(arrays, config, probabilities)
    position_ids = to_numpy(places[0])
    return Trace(
        arrays,
        input_ids=to_numpy(ids),
        positions=position_ids[0] if len(position_ids) == 1 else position_ids,
        attention_mask=None if mask is None else to_numpy(mask) != 0,
        metadata={
            "engine": f"transformers {version('transformers')}",
            "attention": str(config._attn_implementation),
            "config": config.to_json_string(use_diff=False),
            "dtype": dtype_name(model.dtype),
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


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Turn dropout off, and put each module back into its mode afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _watched(
    model: Any, keep: Keep, keep_positions: Callable[[Array], None], probabilities: bool
) -> Iterator[None]:
    """Hook the modules and the attention function as long as the context is open."""
    with ExitStack() as stack:

        def output_of(module: Any, name: str) -> None:
            def hook(_: object, __: object, output: Any) -> None:
                keep(name, output[0] if isinstance(output, tuple) else output)

            stack.callback(module.register_forward_hook(hook).remove)

        def input_of(module: Any, name: str, width: int | None = None) -> None:
            def hook(_: object, inputs: tuple[Any, ...]) -> None:
                tensor = inputs[0]
                keep(name, tensor if width is None else tensor.unflatten(-1, (-1, width)))

            stack.callback(module.register_forward_pre_hook(hook).remove)

        def positions(_: object, inputs: tuple[Array, ...], keywords: dict[str, Array]) -> None:
            keep_positions(keywords["position_ids"] if "position_ids" in keywords else inputs[1])

        body = model.model
        stack.callback(
            body.rotary_emb.register_forward_pre_hook(positions, with_kwargs=True).remove
        )
        output_of(body.embed_tokens, "model.embed_tokens")
        for index, layer in enumerate(body.layers):
            name = f"model.layers.{index}"
            for role in _OUTPUTS:
                output_of(layer.get_submodule(role), f"{name}.{role}")
            for role, site in _INPUTS.items():
                width = layer.self_attn.head_dim if site == "self_attn.attention" else None
                input_of(layer.get_submodule(role), f"{name}.{site}", width)
            output_of(layer, name)
        output_of(body.norm, "model.norm")
        output_of(model.lm_head, "lm_head")
        stack.enter_context(_attention_watched(model, keep, probabilities))
        yield


@contextmanager
def _attention_watched(model: Any, keep: Keep, probabilities: bool) -> Iterator[None]:
    """Keep the queries and keys that the attention function is given, and its probabilities.

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

    def attention(module: object, query: Any, key: Any, *rest: Any, **options: Any) -> Any:
        output, weights = function(module, query, key, *rest, **options)
        if (name := names.get(id(module))) is not None:
            keep(f"{name}.q_rope", query.transpose(1, 2))
            keep(f"{name}.k_rope", key.transpose(1, 2))
            if probabilities:
                if weights is None:
                    raise ValueError(
                        f"probabilities: expected a model with attention 'eager', got {chosen!r}"
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


def _check_complete(arrays: dict[str, np.ndarray], config: Any, probabilities: bool) -> None:
    roles = [*_OUTPUTS, *_INPUTS.values(), "self_attn.q_rope", "self_attn.k_rope"]
    if probabilities:
        roles.append("self_attn.probabilities")
    for index in range(config.num_hidden_layers):
        for role in roles:
            if (name := f"model.layers.{index}.{role}") not in arrays:
                raise RuntimeError(
                    f"{name}: never seen; expected transformers' own layers, not compiled and not "
                    "replaced by kernels"
                )

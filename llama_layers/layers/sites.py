"""The sites of a forward pass: what they are called, what they are computed from, and how.

A site has the name of its module in Hugging Face's model, and its array is what that module gives
there. Where no module stands (queries and keys after RoPE, scores, probabilities, the heads before
they are projected out, the sum after attention), a name beside them does. Families have different
names for a module that does the same; a site's role is one of these, the same in all families.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

from llama_layers.config.families import module_name
from llama_layers.config.llama_config import LlamaConfig

# In a layer, in the order of a forward pass: name, operation, shape, and the ways in which it can
# be recomputed, the most local first. "x" is the input of the layer. Sites marked with a star hold
# a number for each pair of tokens, and are recorded only when asked for. A row that begins with
# "switch?" is there only if the config has that switch on. If it is off, the sites in later rows
# that are computed from that row are computed from its inputs instead.
_LAYER = """
norms_before? input_layernorm  norm  B S hidden  x
self_attn.q_proj          linear       B S queries  input_layernorm
self_attn.k_proj          linear       B S keys     input_layernorm
self_attn.v_proj          linear       B S keys     input_layernorm
qk_norm_before_rope? self_attn.q_norm  norm  B S q_norm  self_attn.q_proj
qk_norm_before_rope? self_attn.k_norm  norm  B S k_norm  self_attn.k_proj
self_attn.q_rope          rope         B S heads D  self_attn.q_norm
self_attn.k_rope          rope         B S kv D     self_attn.k_norm
qk_norm_after_rope? self_attn.q_norm  norm  B S q_norm  self_attn.q_rope
qk_norm_after_rope? self_attn.k_norm  norm  B S k_norm  self_attn.k_rope
self_attn.scores*         scores       B heads S S  self_attn.q_norm,self_attn.k_norm
self_attn.probabilities*  softmax      B heads S S  self_attn.scores;self_attn.q_norm,self_attn.k_norm
self_attn.attention       attention    B S heads D  self_attn.probabilities,self_attn.v_proj;self_attn.q_norm,self_attn.k_norm,self_attn.v_proj
self_attn.o_proj          linear       B S hidden   self_attn.attention
norms_after? post_self_attn_layernorm  norm  B S hidden  self_attn.o_proj
attention_residual        residual     B S hidden   x,post_self_attn_layernorm
norms_before? post_attention_layernorm  norm  B S hidden  attention_residual
mlp.gate_proj             linear       B S inner    post_attention_layernorm
mlp.up_proj               linear       B S inner    post_attention_layernorm
mlp.act                   gate         B S inner    mlp.gate_proj,mlp.up_proj
mlp.down_proj             linear       B S hidden   mlp.act
norms_after? post_mlp_layernorm  norm  B S hidden  mlp.down_proj
layer                     residual     B S hidden   attention_residual,post_mlp_layernorm
""".strip()  # noqa: E501  # a table

# What the head gives, and the logits where they are not that.
HEAD, LOGITS = "lm_head", "logits"
# What is made of the logits after a forward pass. No tap sees it.
LOGPROBS = "logprobs"


@dataclass(frozen=True)
class Site:
    """A place in a forward pass whose array can be recorded and checked.

    Attributes
    ----------
    name : str
        As in Hugging Face's model of the family: ``model.layers.3.self_attn.q_proj``.
    role : str
        What it is, whatever the family calls it: ``self_attn.q_proj``, or "layer" for the layer's
        own output. It is the name inside the layer, but for modules that `Family` lists.
    layer : int or None
        Which layer it is in; None before the first and after the last.
    operation : str
        What computes it: "embedding", "norm", "linear", "rope", "scores", "softmax", "attention",
        "residual", "gate", "logits" or "logprobs".
    shape : tuple of str
        Its axes: "B" and "S" for batch and sequence, numbers for the others.
    routes : tuple of tuple of str
        The names of the sites that it is computed from: one or more ways, the most local first.
    pairwise : bool
        Whether it holds a number for each pair of tokens.
    optional : bool
        Whether it is recorded only when asked for, and not missing otherwise: sites of pairs, and
        log-probabilities, which follow the forward pass.
    """

    name: str
    role: str
    layer: int | None
    operation: str
    shape: tuple[str | int, ...]
    routes: tuple[tuple[str, ...], ...]
    pairwise: bool = False
    optional: bool = False

    @property
    def inside(self) -> str:
        """The name inside the layer; "layer" for the layer's own output."""
        if self.layer is None:
            return self.name
        return self.name.removeprefix(f"model.layers.{self.layer}").removeprefix(".") or "layer"

    @property
    def split_axis(self) -> int:
        """The axis of heads, channels or tokens of the vocabulary, which ranks may divide."""
        return 1 if self.pairwise else 2

    @property
    def names(self) -> tuple[str, str, str]:
        """What it may be called: its name, that inside the layer, and the last word of it."""
        return self.name, self.inside, self.inside.rpartition(".")[2]


def sites(config: LlamaConfig, /) -> tuple[Site, ...]:
    """Every site of a model, in the order of a forward pass.

    Parameters
    ----------
    config : LlamaConfig
        The model's numbers.

    Returns
    -------
    tuple of Site
        From ``model.embed_tokens`` to ``lm_head``, or ``logits`` where these are scaled or capped,
        and ``logprobs``.

    Examples
    --------
    >>> from llama_layers import LlamaConfig
    >>> from llama_layers.verify import sites
    >>> found = sites(LlamaConfig.smollm2_135m())
    >>> len(found), found[2].name, found[2].shape
    (514, 'model.layers.0.self_attn.q_proj', ('B', 'S', 576))
    """
    return _of_model(config)


@lru_cache(maxsize=8)
def _of_model(config: LlamaConfig) -> tuple[Site, ...]:
    hidden, logits = config.hidden_size, ("B", "S", config.vocab_size)
    changed, of_logprobs = [LOGITS] if config.changes_logits else [], (logits_site(config),)
    last = f"model.layers.{config.num_hidden_layers - 1}"
    embedding, norm = "model.embed_tokens", "model.norm"
    return (
        Site(embedding, embedding, None, "embedding", ("B", "S", hidden), ((),)),
        *(site for layer in range(config.num_hidden_layers) for site in _of_layer(config, layer)),
        Site(norm, norm, None, "norm", ("B", "S", hidden), ((last,),)),
        Site(HEAD, HEAD, None, "linear", logits, ((norm,),)),
        *(Site(name, name, None, "logits", logits, ((HEAD,),)) for name in changed),
        Site(LOGPROBS, LOGPROBS, None, "logprobs", ("B", "S"), (of_logprobs,), optional=True),
    )


def _of_layer(config: LlamaConfig, layer: int) -> Iterator[Site]:
    name = f"model.layers.{layer}"

    def named(role: str) -> str:
        if role in ("x", "layer"):
            return before if role == "x" else name
        return f"{name}.{module_name(config.model_type, role)}"

    before = f"model.layers.{layer - 1}" if layer else "model.embed_tokens"
    heads = config.num_attention_heads, config.head_dim
    kv_heads = config.num_key_value_heads, config.head_dim
    whole = config.qk_norm == "full"
    sizes: dict[str, int | tuple[int, ...]] = {
        "hidden": config.hidden_size,
        "queries": math.prod(heads),
        "keys": math.prod(kv_heads),
        "q_norm": math.prod(heads) if whole else heads,
        "k_norm": math.prod(kv_heads) if whole else kv_heads,
        "heads": config.num_attention_heads,
        "kv": config.num_key_value_heads,
        "D": config.head_dim,
        "inner": config.intermediate_size,
    }
    instead: dict[str, str] = {}
    for line in _LAYER.splitlines():
        *switch, role, operation, axes, routes = re.split(r"\? +|  +", line)
        if switch and not getattr(config, switch[0]):
            instead[role] = routes
            continue
        instead.pop(role, None)
        inputs = (
            tuple(named(instead.get(part, part)) for part in route.split(","))
            for route in routes.split(";")
        )
        shape: tuple[str | int, ...] = ()
        for axis in axes.split():
            size = sizes.get(axis, axis)
            shape += size if isinstance(size, tuple) else (size,)
        starred = role.endswith("*")
        role = role.rstrip("*")
        yield Site(named(role), role, layer, operation, shape, tuple(inputs), starred, starred)


def logits_site(config: LlamaConfig) -> str:
    """The site of a model that has its logits."""
    return LOGITS if config.changes_logits else HEAD


def names_of(found: Iterable[Site]) -> dict[str, tuple[str, ...]]:
    """Return what each site may be called, by its name: its role, too, if that names no other."""
    found = list(found)
    taken = {site.inside for site in found}
    return {s.name: s.names if s.role in taken else (*s.names, s.role) for s in found}


def names_matching(
    argument: str, pattern: str, known: Mapping[str, Iterable[str]]
) -> tuple[str, ...]:
    """Return the sites that a pattern matches by any of their names.

    `known` has the names of each site, by the first of them. Raises ValueError, with the closest
    name, if the pattern matches none.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"{argument}: expected names of sites, got {type(pattern).__name__}")
    if pattern in known:
        return (pattern,)
    # torch.compile cannot trace fnmatch.
    matches = fnmatchcase if any(sign in pattern for sign in "*?[") else operator.eq
    found = tuple(site for site, names in known.items() if any(matches(n, pattern) for n in names))
    if not found:
        every = sorted({name for names in known.values() for name in names})
        close = difflib.get_close_matches(pattern, every, n=1)
        said = f" (is it {close[0]!r}?)" if close else ""
        raise ValueError(
            f"{argument}: expected names of sites, got {pattern!r}, which names none{said}"
        )
    return found


def sites_of_model(config: LlamaConfig, pattern: str) -> tuple[str, ...]:
    """Return the names of the sites of a model that a key of a tap names."""
    known = _names_in_model(config)
    return (pattern,) if pattern in known else _found_in_model(config, pattern)


@lru_cache(maxsize=8)
def _names_in_model(config: LlamaConfig) -> dict[str, tuple[str, ...]]:
    return names_of(site for site in sites(config) if site.name != LOGPROBS)


@lru_cache(maxsize=256)  # for a loop of forward passes
def _found_in_model(config: LlamaConfig, pattern: str) -> tuple[str, ...]:
    return names_matching("tap", pattern, _names_in_model(config))


@lru_cache(maxsize=256)
def sites_of_layer(config: LlamaConfig, pattern: str) -> tuple[str, ...]:
    """Return the names inside a layer of the sites there that a key of a tap names."""
    inner = [site for site in _of_layer(config, 0) if site.role != "layer"]
    names = names_of(inner)
    return names_matching("tap", pattern, {s.inside: names[s.name][1:] for s in inner})


def sites_of_mlp(pattern: str) -> tuple[str, ...]:
    """Return the names inside an MLP of the sites there that a key of a tap names."""
    rows = [line.split()[0] for line in _LAYER.splitlines() if line.startswith("mlp.")]
    names = [name.removeprefix("mlp.") for name in rows]
    return names_matching("tap", pattern, {name: (name,) for name in names})

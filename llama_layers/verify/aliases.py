"""The names that other projects give to sites, and arrays under their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import TypeAlias

from llama_layers.arrays.types import Array
from llama_layers.checkpoint.names import META_NAMES, in_family
from llama_layers.errors import TraceError
from llama_layers.layers.sites import LOGPROBS
from llama_layers.verify.stored import StoredArrays, stored

SCHEMES = ("Hugging Face", "Meta", "llama.cpp", "TransformerLens")

# One row a site: Hugging Face, llama.cpp, TransformerLens. {} is the number of the layer, - stands
# where the scheme has no name, and | between names of which a file has one. llama.cpp gives several
# tensors one name: -1 after # is the last of them, which is meant where there is no #, and -2 the
# one before it. Hugging Face's names are those of most families; `Family` has the others.
# Where the names were read: Meta's llama/model.py (modules); llama.cpp's llama-graph.cpp and
# models/llama.cpp (names given to callbacks); TransformerLens 2.18 (hooks of HookedTransformer)
# and, for names that end in hook_out, 4.3 (TransformerBridge).
_TABLE = """
model.embed_tokens                        embd|inp_embd|inp_scaled       hook_embed
model.layers.{}.input_layernorm           attn_norm-{}                   blocks.{}.ln1.hook_out
model.layers.{}.self_attn.q_proj          Qcur-{}#-2                     blocks.{}.attn.hook_q
model.layers.{}.self_attn.k_proj          Kcur-{}#-2                     blocks.{}.attn.hook_k
model.layers.{}.self_attn.v_proj          Vcur-{}                        blocks.{}.attn.hook_v
model.layers.{}.self_attn.q_norm          Qcur_normed-{}                 blocks.{}.attn.q_norm.hook_out
model.layers.{}.self_attn.k_norm          Kcur_normed-{}                 blocks.{}.attn.k_norm.hook_out
model.layers.{}.self_attn.q_rope          Qcur-{}#-1                     blocks.{}.attn.hook_rot_q
model.layers.{}.self_attn.k_rope          Kcur-{}#-1                     blocks.{}.attn.hook_rot_k
model.layers.{}.self_attn.scores          -                              blocks.{}.attn.hook_attn_scores
model.layers.{}.self_attn.probabilities   kq_soft_max-{}                 blocks.{}.attn.hook_pattern
model.layers.{}.self_attn.attention       kqv_out-{}                     blocks.{}.attn.hook_z
model.layers.{}.self_attn.o_proj          attn_out-{}                    blocks.{}.hook_attn_out
model.layers.{}.post_self_attn_layernorm  attn_post_norm-{}|post_attn_norm-{}  blocks.{}.ln1_post.hook_out
model.layers.{}.attention_residual        ffn_inp-{}|sa_out-{}           blocks.{}.hook_resid_mid
model.layers.{}.post_attention_layernorm  ffn_norm-{}                    blocks.{}.ln2.hook_out
model.layers.{}.mlp.gate_proj             ffn_gate-{}|ffn_gate_b-{}      blocks.{}.mlp.hook_pre
model.layers.{}.mlp.up_proj               ffn_up-{}|ffn_up_b-{}          blocks.{}.mlp.hook_pre_linear
model.layers.{}.mlp.act                   ffn_swiglu-{}|ffn_gate_par-{}  blocks.{}.mlp.hook_post
model.layers.{}.mlp.down_proj             ffn_out-{}                     blocks.{}.hook_mlp_out
model.layers.{}.post_mlp_layernorm        ffn_post_norm-{}|post_mlp_norm-{}  blocks.{}.ln2_post.hook_out
model.layers.{}                           l_out-{}                       blocks.{}.hook_resid_post
model.norm                                result_norm                    ln_final.hook_out
lm_head                                   result_output                  unembed.hook_out
logits                                    -                              -
logprobs                                  -                              -
""".strip()  # noqa: E501  # a table
# Modules of Meta's have the names of their weights; the layer itself has none.
_META = META_NAMES | {"model.layers.{}": "layers.{}"}

# Names that other engines give to a site beside those of modules: vLLM and SGLang call the module
# of attention so, and inputs of modules are what has no module of its own.
_MORE = {
    "model.layers.{}.self_attn.attn": "model.layers.{}.self_attn.attention",
    "model.layers.{}.self_attn.o_proj.input": "model.layers.{}.self_attn.attention",
    "model.layers.{}.post_attention_layernorm.input": "model.layers.{}.attention_residual",
    "model.layers.{}.mlp.down_proj.input": "model.layers.{}.mlp.act",
    "model.layers.{}.self_attn.past_key": "model.layers.{}.self_attn.past_key",
    "model.layers.{}.self_attn.past_value": "model.layers.{}.self_attn.past_value",
}
# What else log-probabilities are called: by vLLM and SGLang, verl, TRL, NeMo-RL, PyTorch.
_LOGPROBS = """
logprob log_prob log_probs token_logprob token_logprobs token_log_probs sampled_logprobs
selected_logprobs output_token_logprobs output_log_probs old_log_prob old_log_probs
rollout_log_probs old_logprobs prev_logprobs generation_logprobs ref_log_prob ref_log_probs
per_token_logps old_per_token_logps ref_per_token_logps log_softmax
""".split()
# Endings that hooks append to the name of a module: the first of several outputs has a number.
_ENDINGS = tuple(
    f"{sign}{word}{number}"
    for sign in "._"
    for word in ("output", "out")
    for number in ("", f"{sign}0", "[0]")
)
# What wrappers put before the names of a model's modules: DDP, torch.compile, PEFT, models of
# images and text.
_WRAPPERS = re.compile(
    r"(?:module\.|_orig_mod\.|base_model\.model\.|(?:model\.)?language_model\.)+"
)
_NUMBER = re.compile(r"(?<=[.-])(0|[1-9]\d*)(?=\.|$)")
_OCCURRENCE = re.compile(r"(.+-\d+)#(\d+)")
_INPUT = ".input"
# By name, with {} for the number of a layer: schemes, sites, and which tensor of that name.
_Meanings: TypeAlias = Mapping[str, list[tuple[str, str, int]]]


def alias_table() -> Iterator[tuple[str, ...]]:
    """Yield the names of each site in `SCHEMES`: {} for its layer, an empty text for none."""
    for line in _TABLE.splitlines():
        site, *others = ("" if name == "-" else name for name in line.split())
        yield site, _META.get(site, ""), *others


def _columns(model_type: str) -> Iterator[tuple[str, str, str, int]]:
    """Yield each name in the table: its scheme, the name, its site, and which of its tensors."""
    for row in alias_table():
        if (site := in_family(row[0], model_type)) is None:
            continue
        for scheme, cell in zip(SCHEMES, (site, *row[1:]), strict=True):
            for name in filter(None, cell.split("|")):
                plain, _, place = name.partition("#")
                yield scheme, plain, site, int(place or -1)
    for given, site in _MORE.items():
        module, ending, _ = given.partition(_INPUT)
        if (own := in_family(module, model_type)) is not None:
            yield SCHEMES[0], own + ending, site, -1


@cache
def _meanings(model_type: str) -> _Meanings:
    """What each name means, in a family: schemes with their sites, and which of its tensors."""
    found: dict[str, list[tuple[str, str, int]]] = {}
    for scheme, name, site, place in _columns(model_type):
        found.setdefault(name, []).append((scheme, site, place))
    return found | {name: [("RL", LOGPROBS, -1)] for name in _LOGPROBS}


def canonical_arrays(
    arrays: Mapping[str, Array], /, model_type: str = "llama"
) -> Mapping[str, Array]:
    """Return arrays under the names of `sites`, whichever scheme they are named by.

    Parameters
    ----------
    arrays : mapping of str to Array
        By name. A missing "model.", an ending like ".output", which hooks append, and a beginning
        like "module.", which wrappers prepend, change nothing.
    model_type : str, optional
        The family of the model. Hugging Face's names are those of its class.

    Returns
    -------
    mapping of str to Array
        The same arrays, none of them read. An unknown name is left as it is.

    Raises
    ------
    TraceError
        If two names mean one site, or it cannot be told which site a name means.

    Examples
    --------
    >>> from llama_layers.verify.aliases import canonical_arrays
    >>> list(canonical_arrays({"blocks.3.attn.hook_q": None}))
    ['model.layers.3.self_attn.q_proj']
    """
    given: dict[str, str] = {}  # by site
    for site, name in _named(arrays, _meanings(model_type)):
        if site in given:
            raise TraceError(f"{given[site]!r} and {name!r}: both mean {site}; expected one")
        given[site] = name
    if isinstance(arrays, dict):
        return {site: arrays[name] for site, name in given.items()}
    return StoredArrays({site: stored(arrays, name) for site, name in given.items()})


def _named(names: Iterable[str], known: _Meanings) -> Iterator[tuple[str, str]]:
    """Yield the site that each name means, or the name itself, and the name."""
    tensors: dict[str, list[tuple[int, str]]] = {}  # by name without #
    for name in names:
        numbered = _OCCURRENCE.fullmatch(name)
        plain, place = (numbered[1], int(numbered[2])) if numbered else (name, 0)
        for other, another in tensors.get(plain, []):
            if place == other:
                raise TraceError(f"{another!r} and {name!r}: both are number {place} of that name")
        tensors.setdefault(plain, []).append((place, name))
    is_llama_cpp = any(schemes_of(plain) == {"llama.cpp"} for plain in tensors)
    is_meta = any(schemes_of(plain) == {"Meta"} for plain in tensors if plain != "norm")
    for plain, found in tensors.items():
        if plain == "norm" and is_llama_cpp:
            if is_meta:
                raise TraceError(
                    "'norm': expected names of one scheme, got names of Meta's and of llama.cpp's, "
                    "where it means rows after and before they are multiplied with the weight"
                )
            yield plain, plain
            continue
        yield from _sites_of(plain, [name for _, name in sorted(found)], known)


def _sites_of(plain: str, names: list[str], known: _Meanings) -> Iterator[tuple[str, str]]:
    """Yield the sites that the tensors of one name mean, in the order of computation."""
    template, number = split_number(plain)
    meanings = known.get(template) or _forgiving(template, known)
    if not meanings:
        yield from ((name, name) for name in names)
        return
    if len(meanings) > len(names):
        sites = " or ".join(site.format(number) for _, site, _ in meanings)
        raise TraceError(
            f"{plain!r}: can mean {sites}; expected {plain}#0, {plain}#1 and so on, in the order "
            "in which they were computed"
        )
    for _, site, place in meanings:
        yield site.format(number), names[place]


def split_number(name: str) -> tuple[str, str]:
    """Split a name into one with {} for the number of its layer, and that number."""
    number = _NUMBER.search(name)
    if number is None:
        return name, ""
    return f"{name[: number.start()]}{{}}{name[number.end() :]}", number[0]


def _forgiving(template: str, known: _Meanings) -> list[tuple[str, str, int]]:
    """Return the meaning of a module's name that hooks or wrappers have lengthened or shortened."""
    for name in (template, plain_name(template)):
        for candidate in (name, f"model.{name}"):
            meanings = known.get(candidate, [])
            if meanings and meanings[0][0] in ("Hugging Face", "Meta"):
                return meanings[:1]
    return []


def plain_name(name: str) -> str:
    """Return a module's name without what wrappers put before it and hooks append to it."""
    bare = name[found.end() :] if (found := _WRAPPERS.match(name)) else name
    ending = max((ending for ending in _ENDINGS if bare.endswith(ending)), key=len, default="")
    return bare.removesuffix(ending)


def schemes_of(name: str) -> set[str]:
    """Return the schemes that know a name; Hugging Face's names are Llama's."""
    return {scheme for scheme, _, _ in _meanings("llama").get(split_number(name)[0], [])}

"""Two traces side by side, without a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS, FloatFormat
from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array
from llama_layers.config.families import FAMILIES
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.errors import TraceError
from llama_layers.layers.mask import Mask
from llama_layers.layers.sites import LOGITS, LOGPROBS, Site, sites
from llama_layers.verify.distance import distance_by_token
from llama_layers.verify.fit import OF_LAST_TOKEN
from llama_layers.verify.logprob_arrays import NextIds, aligned, fitted_logprobs, next_tokens
from llama_layers.verify.logprob_summary import summary_of_comparison
from llama_layers.verify.report.comparison import Comparison, SiteDifference
from llama_layers.verify.stated_config import stated_config
from llama_layers.verify.stored import TOKENS, StoredArrays, info_of, stored
from llama_layers.verify.trace import Trace
from llama_layers.verify.unknown_names import check_names, without_unknown
from llama_layers.verify.validate import validated

# The most layers that a config allows; a name with a higher number does not count.
_LAYERS = 10_000
# More than any vocabulary has.
_MOST_TOKENS = 2**31


def compare(trace_a: Trace, trace_b: Trace, /, *, ignore_unknown: bool = False) -> Comparison:
    r"""Say how far two traces are apart at each site, and how much of that is inherited.

    Parameters
    ----------
    trace_a, trace_b : Trace
        Of the same tokens. Where the metadata of one has a "config", arrays in any of the shapes
        that `check` knows are compared; else those of a site must have the same shape in both.
    ignore_unknown : bool, optional
        Whether arrays that have no site's name are left out instead of refused.

    Returns
    -------
    Comparison
        A result for each site that both have.

    Raises
    ------
    TraceError
        If the traces are of different tokens or models, share no site, or have arrays that cannot
        be compared.
    TypeError
        If an argument is not a Trace.

    Notes
    -----
    A site's difference is :math:`\lVert a - b \rVert / \lVert a \rVert` of a token, as the root
    mean square over tokens, but for padding. So a token whose activations are a thousand times as
    large as those of others, as the first often is, does not hide what the others differ by. A site
    is a suspect if its difference is more than 10 times

    .. math:: \max_i d_i + u \sqrt{n},

    where :math:`d_i` are the differences of its inputs, :math:`u` is the unit roundoff of the
    coarser of the two formats, and :math:`n` the number of operations since those inputs: 1, if
    they were recorded.

    That is experience, and no bound: between right runs of SmolLM2 in float16, bfloat16, float32
    and float64, no site exceeds 3 times it. An operation may amplify what it inherits, as a softmax
    of large scores does, and be right; a mistake in few elements may hide below it; two traces with
    the same mistake agree. With a model, `check` judges each element of each site by what rounding
    allows there.

    Log-probabilities are also compared in nats, token by token.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers.verify import Trace, compare
    >>> x, y = np.ones((1, 2, 4), np.float32), np.ones((1, 2, 6), np.float32)
    >>> a = Trace({"model.layers.0.input_layernorm": x, "model.layers.0.self_attn.q_proj": y})
    >>> b = Trace({"model.layers.0.input_layernorm": x, "model.layers.0.self_attn.q_proj": 2 * y})
    >>> comparison = compare(a, b)
    >>> comparison.first.site.name, comparison.first.difference
    ('model.layers.0.self_attn.q_proj', 1.0)
    """
    traces: tuple[Trace, ...] = (trace_a, trace_b)
    for name, trace in zip(("trace_a", "trace_b"), traces, strict=True):
        if not isinstance(trace, Trace):
            raise TypeError(f"{name}: expected a Trace, got {type(trace).__name__}")
    stated = [c for t in traces if (c := stated_config(t.metadata)) is not None]
    # That of more tokens may count rows of padding in the embedding.
    config = min(stated, key=lambda c: c.vocab_size, default=None)
    layout = config or _stand_in(traces)
    every = sites(layout)
    if ignore_unknown:
        trace_a, trace_b = traces = tuple(without_unknown(trace, layout) for trace in traces)
    (arrays_a, ids_a), (arrays_b, ids_b) = (_arrays(trace, config, layout) for trace in traces)
    common = [site for site in every if site.name in arrays_a and site.name in arrays_b]
    if not common:
        raise TraceError("traces: expected at least one site that both have, got none")
    same_tokens = _check_tokens(trace_a, trace_b)
    keep = _keep(traces)
    differences: dict[str, SiteDifference] = {}
    logprobs = None
    for site in common:
        both = ((arrays_a, trace_a), (arrays_b, trace_b))
        formats = [_format(site, info_of(arrays, site.name).dtype, t) for arrays, t in both]
        a, b = (to_numpy(arrays[site.name]) for arrays, _ in both)
        inputs, steps = _nearest(site, every, differences)
        if site.name == LOGPROBS and ids_a is not None and ids_b is not None:
            a, b, known = aligned((a, b), (ids_a, ids_b))
            logprobs = summary_of_comparison(a, b, known, keep)
            counts = known >= 0 if a.shape[-1] == 1 or keep is None else keep[:, -a.shape[1] :]
            # Those near 0 may differ by any factor: all are one row.
            a, b, allowed = a[counts][None], b[counts][None], None
        else:
            a, b, allowed = _rows(site, a, b, keep, config)
        differences[site.name] = SiteDifference(
            site,
            (formats[0].name, formats[1].name),
            distance_by_token(a, b, allowed),
            inputs,
            max((differences[i].difference for i in inputs if i in differences), default=0.0),
            max(form.unit_roundoff for form in formats) * math.sqrt(steps),
            _identical(a, b),
            _odd(a, b, allowed),
        )
    return Comparison(
        tuple(differences.values()),
        tuple(site.name for site in every if site.name in arrays_a and site not in common),
        tuple(site.name for site in every if site.name in arrays_b and site not in common),
        same_tokens,
        dict(trace_a.metadata),
        dict(trace_b.metadata),
        logprobs,
    )


def _stand_in(traces: Sequence[Trace]) -> LlamaConfig:
    """Make a config with the sites that the names tell: its layers, and norms of a family."""
    names = [name.split(".") for trace in traces for name in trace.arrays]
    numbers = (parts[2] for parts in names if len(parts) > 2 and parts[2].isdecimal())
    layers = [int(n) for n in numbers if len(n) <= len(str(_LAYERS)) and int(n) < _LAYERS]
    inside = {".".join(parts[3:]) for parts in names}
    likeliest = max(_every_block(), key=lambda c: len(inside & {s.inside for s in sites(c)}))
    scaling = 2.0 if any(LOGITS in trace.arrays for trace in traces) else 1.0
    return replace(
        likeliest,
        num_hidden_layers=1 + max(layers, default=0),
        layer_types=None,
        layer_rope_theta=None,
        logits_scaling=scaling,
    )


@cache
def _every_block() -> tuple[LlamaConfig, ...]:
    """A layer of each family, and with norms in other places; Llama's first."""
    choices: list[dict[str, str]] = [{"model_type": family} for family in FAMILIES]
    for placement in ("before", "after", "both"):
        choices += [{"norm_placement": placement, "qk_norm": norm} for norm in ("none", "head")]
    return tuple(
        LlamaConfig(
            **choice,  # type: ignore[arg-type]
            vocab_size=2,
            hidden_size=2,
            intermediate_size=2,
            num_hidden_layers=1,
            num_attention_heads=1,
            rms_norm_eps=1e-5,
            rope_theta=1e4,
            max_position_embeddings=1,
        )
        for choice in choices
    )


def _arrays(
    trace: Trace, config: LlamaConfig | None, known: LlamaConfig
) -> tuple[Mapping[str, Array], NextIds | None]:
    """Return the arrays of a trace, in the shapes of a config if there is one.

    And the tokens whose log-probabilities it has, which are brought into one shape in any case.
    """
    if config is not None:
        recorded = validated(trace, config)
        return recorded.arrays, recorded.next_ids
    check_names(trace.arrays, known)
    if LOGPROBS not in trace.arrays or trace.input_ids is None:
        return trace.arrays, None
    ids, array = np.atleast_2d(to_numpy(trace.input_ids)), stored(trace.arrays, LOGPROBS)
    extent = (ids.shape[0], ids.shape[1])
    vocabulary = max(array.info().shape[-1:], default=0)
    next_ids = next_tokens(trace.next_ids, ids, _keep([trace]), extent, _MOST_TOKENS)
    fitted, next_ids = fitted_logprobs(array, extent, vocabulary, next_ids)
    others = {name: stored(trace.arrays, name) for name in trace.arrays}
    return StoredArrays(others | {LOGPROBS: fitted}), next_ids


def _check_tokens(trace_a: Trace, trace_b: Trace) -> bool:
    """Raise TraceError if tokens differ; return whether both traces say which they are."""
    for name in TOKENS:
        a, b = getattr(trace_a, name), getattr(trace_b, name)
        if a is None or b is None:
            continue
        shapes = [list(array.shape) for array in (a, b)]
        a, b = (np.atleast_2d(to_numpy(array)) for array in (a, b))
        batches = {len(a), len(b)} - {1}
        if a.shape[1:] != b.shape[1:] or len(batches) > 1:
            raise TraceError(
                f"{name}: expected the same in both traces, got shapes {shapes[0]} and {shapes[1]}"
            )
        a, b = np.broadcast_arrays(a, b)
        if not np.array_equal(a, b):
            where = tuple(int(i) for i in np.argwhere(a != b)[0])
            raise TraceError(
                f"{name}: expected the same in both traces, got {a[where]} and {b[where]} "
                f"at {list(where)}"
            )
    return trace_a.input_ids is not None and trace_b.input_ids is not None


def _keep(traces: Sequence[Trace]) -> NDArray[np.bool_] | None:
    """Return which tokens are not padding, [B, S]; None if all are not."""
    masks = [trace.attention_mask for trace in traces if trace.attention_mask is not None]
    if not masks:
        return None
    keep = np.atleast_2d(to_numpy(masks[0]))
    if keep.ndim != 2 or keep.dtype.kind not in "biuf":
        raise TraceError(
            f"attention_mask: expected 0 and 1 in shape [B, S], got {keep.dtype} in "
            f"{list(keep.shape)}"
        )
    return None if keep.all() else keep.astype(bool)


def _format(site: Site, found: str, trace: Trace) -> FloatFormat:
    """Return the format an array was computed in: its dtype, or a coarser one in the metadata."""
    if found not in FLOATS:
        raise TraceError(
            f"{site.name}: expected one of the dtypes {', '.join(FLOATS)}, got {found}"
        )
    stated = FLOATS.get(trace.metadata.get("dtype", found), FLOATS[found])
    return min(FLOATS[found], stated, key=lambda form: form.precision)


def _nearest(
    site: Site, every: Sequence[Site], common: Mapping[str, object]
) -> tuple[tuple[str, ...], int]:
    """Find the nearest common sites that a site is computed from; count the operations since."""
    for route in site.routes:
        if all(name in common for name in route):
            return route or ("input_ids",), 1
    routes = {other.name: other.routes[-1] for other in every}
    seen: set[str] = set()
    waiting = list(site.routes[-1])
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            if name not in common:
                waiting += routes[name]
    found = tuple(name for name in routes if name in seen and name in common)
    return found or ("input_ids",), 1 + len(seen) - len(found)


def _rows(
    site: Site,
    a: np.ndarray,
    b: np.ndarray,
    keep: NDArray[np.bool_] | None,
    config: LlamaConfig | None,
) -> tuple[np.ndarray, np.ndarray, NDArray[np.bool_] | None]:
    """Return both arrays with a row for each token that counts, and which keys count in a row."""
    if site.name in OF_LAST_TOKEN and a.ndim == b.ndim == 3 and 1 in (a.shape[1], b.shape[1]):
        a, b = a[:, -1:], b[:, -1:]
    if not a.size:
        raise TraceError(f"{site.name}: expected at least one token, got shape {list(a.shape)}")
    if a.shape != b.shape:
        raise TraceError(
            f"{site.name}: expected the same shape in both traces, got {list(a.shape)} and "
            f"{list(b.shape)}"
        )
    if not 2 <= a.ndim <= len(site.shape) + 1:
        raise TraceError(
            f"{site.name}: expected an axis for each of {', '.join(map(str, site.shape))}, got "
            f"shape {list(a.shape)}"
        )
    allowed = None
    if site.pairwise:
        a, b = _pairwise(site, a, config), _pairwise(site, b, config)
        a, b = np.swapaxes(a, 1, 2), np.swapaxes(b, 1, 2)
        window = None if config is None or site.layer is None else config.window_of(site.layer)
        keys = np.arange(a.shape[3])
        past = len(keys) - a.shape[1]
        whole = keep
        if keep is not None and past:
            whole = np.concatenate([np.ones((len(keep), past), bool), keep[:, -a.shape[1] :]], 1)
        rows = np.asarray(Mask(keys[past:], keys, window, whole).rows(0, a.shape[1]))
        allowed = np.broadcast_to(rows, (len(a), *rows.shape[1:]))[:, :, None, :]
    if keep is not None and keep.shape[0] == a.shape[0]:
        if keep.shape[1] < a.shape[1]:
            raise TraceError(
                f"attention_mask: expected a number for each of {a.shape[1]} tokens of "
                f"{site.name}, got {keep.shape[1]}"
            )
        kept = keep[:, -a.shape[1] :]
        return a[kept], b[kept], None if allowed is None else allowed[kept]
    a, b = (array.reshape(-1, *array.shape[2:]) for array in (a, b))
    return a, b, None if allowed is None else allowed.reshape(-1, *allowed.shape[2:])


def _pairwise(site: Site, array: np.ndarray, config: LlamaConfig | None) -> np.ndarray:
    """Return an array of pairs of tokens with all four axes; a config has told those of a past."""
    whole = array if array.ndim == 4 else array[None]
    if whole.ndim != 4 or (config is None and whole.shape[2] != whole.shape[3]):
        raise TraceError(f"{site.name}: expected shape [B, heads, S, S], got {list(array.shape)}")
    return whole


def _identical(a: np.ndarray, b: np.ndarray) -> bool:
    """Tell whether two arrays have the same bits: a zero of the other sign differs."""
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return a.dtype == b.dtype and np.array_equal(
        np.ascontiguousarray(a).view(bits), np.ascontiguousarray(b).view(bits)
    )


def _odd(a: np.ndarray, b: np.ndarray, allowed: NDArray[np.bool_] | None) -> int:
    """Count the NaN and Inf in either array, among the numbers that count."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        odd = ~(np.isfinite(a) & np.isfinite(b))
    return int(np.count_nonzero(odd if allowed is None else odd & allowed))

"""RoPE in the words of config.json: read as the class of its family does, and written.

One schema has theta and the scaling beside each other, another has both in ``rope_parameters``.
Families whose layers differ have that once for each type of layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from llama_layers.config.checks import check_count, check_flag, check_layer_count, check_positive
from llama_layers.config.family import Family
from llama_layers.config.fields import Fields
from llama_layers.config.keys import Keys
from llama_layers.config.rope_scaling import WITHOUT_CONTEXT, RopeScaling, read_scaling
from llama_layers.errors import ConfigError, shown

# The default of most classes.
_THETA = 10000.0
_FULL, _SLIDING = "full_attention", "sliding_attention"
_LOCAL = "rope_local_base_freq"
_TRAINED = "original_max_position_embeddings"
# Fields that the words of a family whose layers differ may say, or not.
OF_LAYERS = frozenset({"layer_rope_theta", "sliding_rope_scaling", "layer_types", "sliding_window"})
# Fields of ours that a file may have among the parameters of RoPE.
_WITHIN = ("partial_rotary_factor", "llama_4_scaling_beta")
# The kinds without a trained context, which transformers also looks for outside of others.
_WITHOUT_CONTEXT = (None, "default", *WITHOUT_CONTEXT)

Thetas = tuple[float, ...]


class _Said(NamedTuple):
    """What an object with parameters of RoPE says."""

    theta: float | None
    scaling: RopeScaling | None
    fields: dict[str, Any]
    unread: dict[str, Any]


def read_rope(arguments: dict[str, Any], keys: Keys, family: Family) -> dict[str, Any]:
    """Put RoPE into the arguments of `LlamaConfig`; return the words that nothing reads."""
    if _TRAINED in family.defaults:
        keys.get(_TRAINED)  # which says nothing where there is no scaling
    scaling, parameters = (
        _object(keys.get(key), key) for key in ("rope_scaling", "rope_parameters")
    )
    if family.rope == "type":
        return _read_types(scaling, parameters, arguments, keys, family)
    unread, usual = {}, False
    if scaling:  # transformers reads nothing of the other then
        words = scaling
        unread = {
            f"rope_parameters.{name}": value
            for name, value in parameters.items()
            if name not in scaling or scaling[name] != value
        }
    elif "rope_parameters" in family.defaults and keys.get("rope_parameters") is None:
        words, usual = family.defaults["rope_parameters"], True  # in which theta is, too
    else:
        words = parameters
    stretch, words = _stretch(words, arguments) if family.ntk_alpha else (1.0, words)
    said = _said("rope_scaling" if scaling else "rope_parameters", words, arguments, keys, family)
    _put(said, None if usual else keys.get("rope_theta"), arguments, family)
    arguments["rope_theta"] *= stretch
    if (thetas := _LAYERS[family.rope](arguments, keys)) is not None:
        arguments["layer_rope_theta"] = thetas
    return said.unread | unread


def _read_types(
    scaling: Mapping[str, Any],
    parameters: Mapping[str, Any],
    arguments: dict[str, Any],
    keys: Keys,
    family: Family,
) -> dict[str, Any]:
    """Do as `read_rope` where there are parameters for each type of layer."""
    _check_kind(scaling)
    full, local = _by_type(scaling, parameters)
    said = _said("rope_parameters", full, arguments, keys, family)
    _put(said, keys.get("rope_theta"), arguments, family)
    other = _said("rope_parameters", local, arguments, keys, family)
    _read_local(other, arguments, keys, family)
    return said.unread | other.unread


def _put(said: _Said, outside: Any, arguments: dict[str, Any], family: Family) -> None:
    """Put into the arguments what an object says, and theta, which may be outside of it."""
    given = [theta for theta in (outside, said.theta) if theta is not None]
    theta = _one_theta(given or [family.defaults.get("rope_theta", _THETA)])
    arguments |= {**said.fields, "rope_theta": theta, "rope_scaling": said.scaling}


def _object(words: Any, key: str) -> Mapping[str, Any]:
    if not words:  # null, false and an empty object are plain RoPE
        return {}
    if not isinstance(words, Mapping):
        raise ConfigError(f"{key}: expected an object, got {shown(words)}")
    return words


def _stretch(
    words: Mapping[str, Any], arguments: Mapping[str, Any]
) -> tuple[float, Mapping[str, Any]]:
    """What HunYuan's alpha multiplies theta by, and the words without the scaling that has it."""
    if _kind(words) != "dynamic" or not words.get("alpha"):
        return 1.0, words
    check_positive("alpha", words["alpha"])
    if (dim := arguments["head_dim"]) is None:
        check_count("num_attention_heads", arguments["num_attention_heads"])
        dim = arguments["hidden_size"] // arguments["num_attention_heads"]
    check_count("head_dim", dim)
    if dim <= 2:
        raise ConfigError(f"head_dim: expected more than 2 with alpha, got {dim}")
    rest = {name: value for name, value in words.items() if name == "rope_theta"}
    return words["alpha"] ** (dim / (dim - 2)), rest


def _check_kind(scaling: Mapping[str, Any]) -> None:
    """Raise ConfigError for an older key that a class with parameters for each type passes over."""
    if scaling.get("rope_type") is None and scaling.get("type") not in (None, "default"):
        raise ConfigError(
            f"rope_scaling: expected the kind as rope_type, got type = {shown(scaling['type'])}, "
            f"which the class of this family does not read"
        )


def _by_type(
    scaling: Mapping[str, Any], parameters: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The parameters of layers without a window, and of those with one."""
    if parameters and not parameters.keys() & {_FULL, _SLIDING}:
        raise ConfigError(
            f"rope_parameters: expected objects for {_FULL} and {_SLIDING}, got {shown(parameters)}"
        )
    full, sliding = (
        _object(parameters.get(name), f"rope_parameters.{name}") for name in (_FULL, _SLIDING)
    )
    return _outside_truncate({**full, **scaling}, parameters), _outside_truncate(
        sliding, parameters
    )


def _outside_truncate(words: Mapping[str, Any], parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give the parameters of a type of layer the truncate that is beside the types."""
    key = "truncate"
    if not words.get(key, True) and words[key] is not None:
        raise ConfigError(
            f"{key}: expected it beside {_FULL} and {_SLIDING}, got {shown(words[key])} for one of "
            f"them, where transformers does not read it"
        )
    outside = {key: parameters[key]} if words and key in parameters else {}
    return {name: value for name, value in words.items() if name != key} | outside


def _said(
    key: str,
    words: Mapping[str, Any],
    arguments: dict[str, Any],
    keys: Keys,
    family: Family,
) -> _Said:
    if not words:
        return _Said(None, None, {}, {})
    ours = {name: words[name] for name in _WITHIN if name in family.reads and name in words}
    fields = {name: value for name, value in ours.items() if value is not None}
    if "llama_4_scaling_beta" in family.reads and _kind(words) in _WITHOUT_CONTEXT:
        ours[_TRAINED] = fields["llama_4_scaling_context"] = words.get(_TRAINED)
    rest = {name: value for name, value in words.items() if name not in ours}
    scaling, names = read_scaling(_completed(rest, arguments, keys, family))
    unread = {f"{key}.{name}": words.get(name) for name in names}
    return _Said(words.get("rope_theta"), scaling, fields, unread)


def _kind(words: Mapping[str, Any]) -> Any:
    """The kind of scaling, under its newer key first."""
    return words.get("rope_type", words.get("type"))


def _completed(
    words: Mapping[str, Any], arguments: Mapping[str, Any], keys: Keys, family: Family
) -> Mapping[str, Any]:
    """Add to a scaling what is said outside: the trained context, as in files made from Phi's."""
    kind = _kind(words)
    if isinstance(kind, str) and kind in family.scaling_names and "short_factor" in words:
        kind = family.scaling_names[kind]
        words = {**words, "rope_type": kind}
    if kind in _WITHOUT_CONTEXT:
        return words
    if words.get("truncate", True) is None:  # which transformers takes for false
        words = {**words, "truncate": False}
    context = arguments["max_position_embeddings"]
    outside, trained = keys.get(_TRAINED), words.get(_TRAINED)
    if family.rope == "type":
        if outside is not None and trained is None:
            raise ConfigError(
                f"{_TRAINED}: expected it beside rope_type, got {shown(outside)} elsewhere, which "
                f"the class of this family does not read"
            )
    elif None not in (outside, trained) and outside != trained:
        raise ConfigError(f"{_TRAINED}: expected one, got {shown(trained)} and {shown(outside)}")
    elif (first := keys.get(_TRAINED, family.defaults.get(_TRAINED))) is not None:
        trained = first  # an attribute of the class comes before what the object says
    if trained is None and kind != "yarn":
        trained = context
    completed: dict[str, Any] = {**words, _TRAINED: trained}
    if kind == "longrope" and words.get("factor") is None:
        check_count("max_position_embeddings", context)
        check_count(_TRAINED, trained)
        completed["factor"] = context / trained
    return completed


def _one_theta(given: list[float]) -> float:
    for theta in given:
        check_positive("rope_theta", theta)
    if any(theta != given[0] for theta in given):
        raise ConfigError(
            f"rope_theta: expected one, got {' and '.join(shown(theta) for theta in given)}"
        )
    return given[0]


def _read_local(said: _Said, arguments: dict[str, Any], keys: Keys, family: Family) -> None:
    """Put into the arguments what is other in layers with a window."""
    usual = family.defaults.get("rope_theta", _THETA)
    if _LOCAL in family.defaults:
        found = keys.get(_LOCAL)
        usual = family.defaults[_LOCAL] if found is None else found
    theta = _one_theta([usual if said.theta is None else said.theta])
    scaling = arguments["rope_scaling"]
    if said.scaling is not None and said.scaling != scaling:
        raise ConfigError(
            f"rope_parameters: expected for {_SLIDING} no scaling or that of {_FULL}, got another"
        )
    if scaling is not None and said.scaling is None:
        arguments["sliding_rope_scaling"] = False
    types = arguments["layer_types"]
    if theta != arguments["rope_theta"] and isinstance(types, list):
        arguments["layer_rope_theta"] = tuple(
            theta if kind == _SLIDING else arguments["rope_theta"] for kind in types
        )


def _same(arguments: Mapping[str, Any], keys: Keys) -> Thetas | None:
    """All layers are alike."""
    return None


def _no_rope_layers(arguments: dict[str, Any], keys: Keys) -> Thetas | None:
    """SmolLM3 says 0 for a layer without RoPE, or after how many layers each of those comes.

    Only layers without RoPE have its window, if that is on.
    """
    count, window = arguments["num_hidden_layers"], keys.get("use_sliding_window")
    check_layer_count("num_hidden_layers", count)
    interval = keys.get("no_rope_layer_interval", 4)
    if (rotated := keys.get("no_rope_layers")) is None:
        check_count("no_rope_layer_interval", interval)
        rotated = [int((layer + 1) % interval != 0) for layer in range(count)]
    if not isinstance(rotated, list) or not all(one in (0, 1) for one in rotated):
        raise ConfigError(f"no_rope_layers: expected a list of 0 and 1, got {shown(rotated)}")
    if len(rotated) < count:
        raise ConfigError(
            f"no_rope_layers: expected {count} entries, one for each layer, got {len(rotated)}"
        )
    check_flag("use_sliding_window", window := False if window is None else window)
    if arguments["layer_types"] is None and window and arguments["sliding_window"] is not None:
        arguments["layer_types"] = [_FULL if one else _SLIDING for one in rotated[:count]]
    elif arguments["layer_types"] is None:
        arguments["sliding_window"] = None
    return _thetas(rotated[:count], arguments["rope_theta"])


def _windows_only(arguments: dict[str, Any], keys: Keys) -> Thetas | None:
    """In EXAONE 4 only layers with a window have RoPE, if there is a window at all."""
    types = arguments["layer_types"]
    if arguments["sliding_window"] is None or not isinstance(types, list):
        return None
    return _thetas((kind == _SLIDING for kind in types), arguments["rope_theta"])


def _by_layer(arguments: dict[str, Any], keys: Keys) -> Any:
    """In files of Granite each layer may have a theta of its own."""
    thetas = arguments.pop("layer_rope_theta", None)
    count = arguments["num_hidden_layers"]
    if (
        isinstance(thetas, list)
        and len(thetas) == count
        and set(thetas) == {arguments["rope_theta"]}
    ):
        return None  # all are alike
    return thetas


def _thetas(rotated: Iterable[object], theta: float) -> Thetas | None:
    found = tuple(theta if one else 0.0 for one in rotated)
    return None if all(found) else found


_LAYERS: dict[str, Callable[[dict[str, Any], Keys], Any]] = {
    "same": _same,
    "no_rope_layers": _no_rope_layers,
    "windows": _windows_only,
    "layer": _by_layer,
}


def rope_words(config: Fields, family: Family) -> dict[str, Any]:
    """The keys that say RoPE as far as the family can; `file_content` adds what it cannot."""
    words: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": None}
    if "rope_parameters" in family.defaults:  # which null would stand for
        words["rope_scaling"] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        words["rope_scaling"] = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in vars(config.rope_scaling).items()
            if value is not None
        }
        if _TRAINED in family.defaults:  # where it is read
            words[_TRAINED] = config.rope_scaling.original_max_position_embeddings
    kinds = config.rope_kinds
    if family.rope == "no_rope_layers":
        words["no_rope_layers"] = [int(kind is not None) for kind in kinds]
    types = config.layer_types or ()
    sliding = {kind for kind, one in zip(kinds, types, strict=False) if one == _SLIDING and kind}
    if family.rope == "type":
        theta = min(sliding).theta if sliding else config.rope_theta
        local: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
        full = {
            **(words.pop("rope_scaling") or {"rope_type": "default"}),
            "rope_theta": words.pop("rope_theta"),
        }
        if config.rope_scaling is not None and config.sliding_rope_scaling:
            local = full | {"rope_theta": theta}
        words["rope_parameters"] = {_FULL: full, _SLIDING: local}
        for one in (full, local):
            if "truncate" in one:
                words["rope_parameters"]["truncate"] = one.pop("truncate")
    if "llama_4_scaling_beta" in family.reads:  # whose class needs both
        scaling = words["rope_scaling"]
        scaling["llama_4_scaling_beta"] = config.llama_4_scaling_beta
        if _kind(scaling) in _WITHOUT_CONTEXT:
            context = config.llama_4_scaling_context or config.max_position_embeddings
            scaling[_TRAINED] = context
    return words

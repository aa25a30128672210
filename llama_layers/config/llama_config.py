"""The config of a model: its fields with their checks, read from config.json and written to it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.config import presets
from llama_layers.config.checks import (
    Count,
    Flag,
    HeadDim,
    LayerCount,
    Positive,
    TokenId,
    TokenIds,
    check_count,
    check_fields,
    check_name,
)
from llama_layers.config.config_file import OWN_KEY, constructor_arguments
from llama_layers.config.families import FAMILIES, SWITCHES, family_switches, unread_fields
from llama_layers.config.presets import Preset
from llama_layers.config.refusals import refuse_other_heads, refuse_other_maths
from llama_layers.config.rope_scaling import RopeScaling
from llama_layers.errors import ConfigError, shown
from llama_layers.files.json_files import read_json

# A published config has a few kilobytes, or some megabytes where each of a hundred thousand tokens
# has a label; a larger one would take time and memory to say nothing.
_MOST_BYTES = 16 * 2**20
# The default of a field that follows from other fields.
_DERIVED: Any = None


def _check_scaling(name: str, value: object) -> None:
    if not isinstance(value, RopeScaling):
        raise ConfigError(
            f"{name}: expected a RopeScaling, a mapping or None, got {type(value).__name__}"
        )


def _check_layer_types(name: str, value: object) -> None:
    if not isinstance(value, tuple):
        raise ConfigError(f"{name}: expected a list, got {shown(value)}")
    for kind in value:
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(
                f"{name}: expected 'full_attention' or 'sliding_attention', got {shown(kind)}"
            )


def _check_act(name: str, value: object) -> None:
    if value != "silu":
        raise ConfigError(f"{name}: expected 'silu', got {shown(value)}")


@dataclass(frozen=True)
class LlamaConfig:
    """Every number of a model that is not a weight.

    Attributes carry the names of config.json's keys. `from_json` reads a file and demands what a
    file must say; the constructor is for configs of your own.

    Attributes
    ----------
    vocab_size : int
        Rows of the embedding.
    hidden_size : int
        Channels of the residual stream.
    intermediate_size : int
        Channels inside the MLP.
    num_hidden_layers : int
        Decoder layers.
    num_attention_heads : int
        Query heads.
    rms_norm_eps : float
        Under the root of every norm.
    rope_theta : float
        Base of the rotary frequencies.
    max_position_embeddings : int
        The context length, in tokens.
    num_key_value_heads : int
        Key and value heads; `num_attention_heads` if not given.
    head_dim : int
        Channels of a head; ``hidden_size / num_attention_heads`` if not given, and free otherwise.
    rope_scaling : RopeScaling, mapping or None
        How frequencies are changed for long contexts.
    sliding_window : int or None
        How many tokens back a token attends, itself included. A config of your own may have it in
        every family; `from_json` reads it where transformers does, not for "llama".
    layer_types : tuple of str or None
        "full_attention" or "sliding_attention" for each layer; None applies `sliding_window` to
        all of them.
    attention_bias : bool
        Whether the four attention projections have biases.
    mlp_bias : bool
        Whether the three MLP projections have biases.
    tie_word_embeddings : bool
        Whether the head is the embedding.
    hidden_act : str
        "silu", the only one.
    model_type : {"llama", "mistral", "qwen2", "qwen3"}
        The family. Qwen2 has biases on queries, keys and values whatever `attention_bias` says.
    qk_norm : {"none", "head", "full"}
        Whether queries and keys are normalised, each head by itself or the whole projection. This
        and the next two are the family's if not given.
    qk_norm_weight : bool
        Whether these norms have weights.
    qk_norm_after_rope : bool
        Whether they come after RoPE, not before it.
    dtype : str or None
        The dtype that the file names for its weights.
    bos_token_id, pad_token_id : int or None
        Special tokens. An id that the vocabulary does not have stands for no token.
    eos_token_id : int, tuple of int or None
        Tokens that end a text.

    Raises
    ------
    ConfigError
        If a number is out of range or some cannot go together; it names them.

    Examples
    --------
    >>> from llama_layers import LlamaConfig
    >>> config = LlamaConfig.llama2_7b()
    >>> config.head_dim, config.num_key_value_heads
    (128, 32)
    """

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: LayerCount
    num_attention_heads: Count
    rms_norm_eps: Positive
    rope_theta: Positive
    max_position_embeddings: Count
    num_key_value_heads: Count = _DERIVED
    head_dim: HeadDim = _DERIVED
    rope_scaling: Annotated[RopeScaling, _check_scaling] | None = None
    sliding_window: Count | None = None
    layer_types: Annotated[tuple[str, ...], _check_layer_types] | None = None
    attention_bias: Flag = False
    mlp_bias: Flag = False
    tie_word_embeddings: Flag = False
    hidden_act: Annotated[str, _check_act] = "silu"
    model_type: Annotated[str, partial(check_name, known=FAMILIES)] = "llama"
    qk_norm: Annotated[str, partial(check_name, known=("none", "head", "full"))] = _DERIVED
    qk_norm_weight: Flag = _DERIVED
    qk_norm_after_rope: Flag = _DERIVED
    dtype: Annotated[str, partial(check_name, known=FLOATS)] | None = None
    bos_token_id: TokenId | None = None
    eos_token_id: TokenIds | None = None
    pad_token_id: TokenId | None = None

    def __post_init__(self) -> None:
        self._derive()
        check_fields(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_key_value_heads: expected a divisor of num_attention_heads = "
                f"{self.num_attention_heads}, got {self.num_key_value_heads}"
            )
        if self.qk_norm == "none" and (self.qk_norm_after_rope or not self.qk_norm_weight):
            raise ConfigError(
                "qk_norm: expected 'head' or 'full', since qk_norm_after_rope or qk_norm_weight "
                "says how, got 'none'"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim: expected an even number (RoPE rotates pairs), got {self.head_dim}"
            )
        if self.rope_theta == 1 and self.rope_scaling and self.rope_scaling.rope_type == "yarn":
            raise ConfigError(
                "rope_theta: expected another number than 1 with yarn, which divides by its "
                "logarithm"
            )
        if self.layer_types is not None:
            if len(self.layer_types) != self.num_hidden_layers:
                raise ConfigError(
                    f"layer_types: expected {self.num_hidden_layers} entries, one for each layer, "
                    f"got {len(self.layer_types)}"
                )
            if "sliding_attention" in self.layer_types and self.sliding_window is None:
                raise ConfigError("sliding_window: missing, and layer_types asks for it")

    def _derive(self) -> None:
        """Fill in what follows from other fields, and give lists and mappings their types."""
        derived: dict[str, Any] = {
            name: tuple(value)
            for name in ("layer_types", "eos_token_id")
            if isinstance(value := getattr(self, name), list)
        }
        if isinstance(self.rope_scaling, Mapping):
            derived["rope_scaling"] = RopeScaling.from_mapping(self.rope_scaling)
        check_name("model_type", self.model_type, FAMILIES)
        for name, value in family_switches(self.model_type).items():
            if getattr(self, name) is None:
                derived[name] = value
        if self.num_key_value_heads is None:
            derived["num_key_value_heads"] = self.num_attention_heads
        if self.head_dim is None:
            check_count("hidden_size", self.hidden_size)
            check_count("num_attention_heads", self.num_attention_heads)
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"hidden_size: expected a multiple of num_attention_heads = "
                    f"{self.num_attention_heads} where head_dim is not given, "
                    f"got {self.hidden_size}"
                )
            derived["head_dim"] = self.hidden_size // self.num_attention_heads
        for name, value in derived.items():
            object.__setattr__(self, name, value)  # since the dataclass is frozen

    def window_of(self, layer: int, /) -> int | None:
        """How many tokens back a layer attends, its own included; None for all.

        Parameters
        ----------
        layer : int
            Which layer.

        Returns
        -------
        int or None
            The sliding window, where the layer has one.
        """
        if self.layer_types is not None and self.layer_types[layer] == "full_attention":
            return None
        return self.sliding_window

    @property
    def switches(self) -> dict[str, Any]:
        """The switches of the block that are not as in Llama, by the names of their fields."""
        return {n: v for n, default in SWITCHES.items() if (v := getattr(self, n)) != default}

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.attention_bias or FAMILIES[self.model_type].qkv_bias

    @property
    def o_bias(self) -> bool:
        """Whether the output projection of attention has a bias."""
        return self.attention_bias and not FAMILIES[self.model_type].qkv_bias

    @property
    def qk_norm_before_rope(self) -> bool:
        """Whether queries and keys are normalised before RoPE."""
        return self.qk_norm != "none" and not self.qk_norm_after_rope

    @property
    def qk_norm_weights(self) -> bool:
        """Whether there are norms of queries and keys that have weights."""
        return self.qk_norm != "none" and self.qk_norm_weight

    # Columns: hidden size, intermediate size, layers, query heads, key/value heads.
    llama_7b = Preset("Llama 1, 7B.", presets.LLAMA_1, 4096, 11008, 32, 32, 32)
    llama_13b = Preset("Llama 1, 13B.", presets.LLAMA_1, 5120, 13824, 40, 40, 40)
    llama_30b = Preset(
        "Llama 1, 33B, whose checkpoint is called 30B.", presets.LLAMA_1, 6656, 17920, 60, 52, 52
    )
    llama_65b = Preset("Llama 1, 65B.", presets.LLAMA_1, 8192, 22016, 80, 64, 64)
    llama2_7b = Preset("Llama 2, 7B.", presets.LLAMA_2, 4096, 11008, 32, 32, 32)
    llama2_13b = Preset("Llama 2, 13B.", presets.LLAMA_2, 5120, 13824, 40, 40, 40)
    llama2_70b = Preset("Llama 2, 70B.", presets.LLAMA_2, 8192, 28672, 80, 64, 8)
    llama3_8b = Preset("Llama 3, 8B.", presets.LLAMA_3, 4096, 14336, 32, 32, 8)
    llama3_70b = Preset("Llama 3, 70B.", presets.LLAMA_3, 8192, 28672, 80, 64, 8)
    llama3_1_8b = Preset("Llama 3.1, 8B.", presets.LLAMA_3_1, 4096, 14336, 32, 32, 8)
    llama3_1_70b = Preset("Llama 3.1 and 3.3, 70B.", presets.LLAMA_3_1, 8192, 28672, 80, 64, 8)
    llama3_1_405b = Preset("Llama 3.1, 405B.", presets.LLAMA_3_1, 16384, 53248, 126, 128, 8)
    llama3_2_1b = Preset("Llama 3.2, 1B.", presets.LLAMA_3_2, 2048, 8192, 16, 32, 8)
    llama3_2_3b = Preset("Llama 3.2, 3B.", presets.LLAMA_3_2, 3072, 8192, 28, 24, 8)
    smollm2_135m = Preset(
        "SmolLM2 135M, instruction-tuned (arXiv:2502.02737).", presets.SMOLLM2, 576, 1536, 30, 9, 3
    )

    qwen3_0_6b = Preset("Qwen3, 0.6B.", presets.QWEN3_TIED, 1024, 3072, 28, 16, 8)
    qwen3_1_7b = Preset("Qwen3, 1.7B.", presets.QWEN3_TIED, 2048, 6144, 28, 16, 8)
    qwen3_4b = Preset("Qwen3, 4B.", presets.QWEN3_TIED, 2560, 9728, 36, 32, 8)
    qwen3_8b = Preset("Qwen3, 8B.", presets.QWEN3, 4096, 12288, 36, 32, 8)
    qwen3_14b = Preset("Qwen3, 14B.", presets.QWEN3, 5120, 17408, 40, 40, 8)
    qwen3_32b = Preset("Qwen3, 32B.", presets.QWEN3, 5120, 25600, 64, 64, 8)

    @classmethod
    def from_json(cls, path_or_dict: str | os.PathLike[str] | Mapping[str, Any], /) -> LlamaConfig:
        """Read a Hugging Face config.json.

        It means what transformers' class of its ``model_type`` makes of it. Both schemas are read:
        ``rope_theta`` and ``rope_scaling`` (with ``type`` or ``rope_type``) beside each other, and
        both nested in ``rope_parameters``; ``torch_dtype`` and ``dtype``.

        Parameters
        ----------
        path_or_dict : str, path or mapping
            The file, the directory it is in, or its parsed content.

        Returns
        -------
        LlamaConfig
            The sizes, the context length and eps must be in the file. Where it leaves out other
            keys, it has the defaults of transformers' class: theta 10000, for example.

        Raises
        ------
        ConfigError
            If the file is not a JSON object, is of another architecture, a draft head or
            quantised, a key that must be there is not, or one is there that another architecture
            reads to change the maths. Other keys that the class does not read are passed over.
        FileNotFoundError
            If there is no such file.

        Examples
        --------
        >>> from llama_layers import LlamaConfig
        >>> LlamaConfig.from_json({"model_type": "llama", "hidden_size": 64})
        Traceback (most recent call last):
        llama_layers.errors.ConfigError: config: missing vocab_size, intermediate_size, ...
        """
        if isinstance(path_or_dict, Mapping):
            return _built(path_or_dict)[0]
        path = Path(path_or_dict)
        return _read(path / "config.json" if path.is_dir() else path)[0]

    def to_json(self) -> dict[str, Any]:
        """The content of a config.json that says the same, in the schema with ``rope_theta``.

        Returns
        -------
        dict
            Plain JSON values; `from_json` gives this config back. Fields that transformers' class
            of the family does not read, such as the window of a Llama, are under
            ``llama_layers``: only this library reads them.

        Examples
        --------
        >>> from llama_layers import LlamaConfig
        >>> config = LlamaConfig.llama3_1_8b()
        >>> LlamaConfig.from_json(config.to_json()) == config
        True
        """
        family, unread = FAMILIES[self.model_type], unread_fields(self.model_type)
        built_in = family_switches(self.model_type)
        content: dict[str, Any] = {"architectures": [family.architecture]}
        own = {}
        for field in fields(self):
            value = getattr(self, field.name)
            value = list(value) if isinstance(value, tuple) else value
            if field.name not in unread:
                content[field.name] = value
            elif value != built_in.get(field.name, field.default):
                own[field.name] = value
        if self.rope_scaling is not None:
            content["rope_scaling"] = {
                key: value for key, value in vars(self.rope_scaling).items() if value is not None
            }
        content["torch_dtype"] = content.pop("dtype")
        if family.switches_window:
            content["use_sliding_window"] = self.sliding_window is not None
            content["max_window_layers"] = 0  # the number of layers before the first with a window
        if self.layer_types is None:
            content.pop("layer_types", None)
        if own:
            content[OWN_KEY] = own
        return content


def read_config(directory: Path) -> tuple[LlamaConfig, tuple[str, ...]]:
    """Read the config.json of a causal language model, and say which keys were not read."""
    return _read(directory / "config.json", refuse_other_heads)


def _read(
    path: Path, check: Callable[[Mapping[str, Any]], None] = lambda _: None
) -> tuple[LlamaConfig, tuple[str, ...]]:
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise ConfigError(f"{path}: expected at most {_MOST_BYTES} bytes, got {size}")
    content = read_json(path, ConfigError)
    try:
        found = _built(content)
        check(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {str(error).removeprefix('config: ')}") from None
    return found


def _built(content: Mapping[str, Any]) -> tuple[LlamaConfig, tuple[str, ...]]:
    arguments, unread = constructor_arguments(content)
    config = LlamaConfig(**arguments)
    refuse_other_maths(unread, vars(config), content)
    return config, tuple(key for key, value in unread.items() if value is not None)

"""What a Llama config.json says, checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.config.checks import check_count, check_flag, check_name, check_positive
from llama_layers.config.keys import refuse_other_heads, refuse_other_maths
from llama_layers.config.presets import PublishedSizes
from llama_layers.config.rope_scaling import RopeScaling
from llama_layers.config.schema import MODEL_TYPES, OWN_KEY, constructor_arguments, unread_fields
from llama_layers.errors import ConfigError, shown
from llama_layers.files.json_files import read_json


@dataclass(frozen=True)
class LlamaConfig(PublishedSizes):
    """Every number of a Llama, Mistral or Qwen2 model that is not a weight.

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
    model_type : {"llama", "mistral", "qwen2"}
        The family. Qwen2 has biases on queries, keys and values whatever `attention_bias` says.
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

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    num_key_value_heads: int = None  # type: ignore[assignment]  # derived when not given
    head_dim: int = None  # type: ignore[assignment]  # likewise
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    model_type: str = "llama"
    dtype: str | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        self._derive()
        for name in _COUNTS:
            check_count(name, getattr(self, name))
        for name in ("rms_norm_eps", "rope_theta"):
            check_positive(name, getattr(self, name))
        for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
            check_flag(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_key_value_heads: expected a divisor of num_attention_heads = "
                f"{self.num_attention_heads}, got {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim: expected an even number (RoPE turns pairs), got {self.head_dim}"
            )
        if self.hidden_act != "silu":
            raise ConfigError(f"hidden_act: expected 'silu', got {shown(self.hidden_act)}")
        check_name("model_type", self.model_type, MODEL_TYPES)
        if self.dtype is not None:
            check_name("dtype", self.dtype, FLOATS)
        if self.sliding_window is not None:
            check_count("sliding_window", self.sliding_window)
        self._check_rope()
        self._check_layer_types()
        self._check_token_ids()

    def _derive(self) -> None:
        """Fill in what follows from other fields; the dataclass is frozen, hence the detour."""
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            check_count("hidden_size", self.hidden_size)
            check_count("num_attention_heads", self.num_attention_heads)
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"hidden_size: expected a multiple of num_attention_heads = "
                    f"{self.num_attention_heads} where head_dim is not given, "
                    f"got {self.hidden_size}"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", RopeScaling.from_mapping(self.rope_scaling))
        for name in ("layer_types", "eos_token_id"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))

    def _check_rope(self) -> None:
        if self.rope_scaling is None:
            return
        if not isinstance(self.rope_scaling, RopeScaling):
            raise ConfigError(
                f"rope_scaling: expected a RopeScaling, a mapping or None, "
                f"got {type(self.rope_scaling).__name__}"
            )
        if self.rope_scaling.rope_type == "yarn" and self.rope_theta == 1:
            raise ConfigError(
                "rope_theta: expected another number than 1 with yarn, which divides by its "
                "logarithm"
            )

    def _check_layer_types(self) -> None:
        if self.layer_types is None:
            return
        if not isinstance(self.layer_types, tuple):
            raise ConfigError(f"layer_types: expected a list, got {shown(self.layer_types)}")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ConfigError(
                f"layer_types: expected {self.num_hidden_layers} entries, one for each layer, "
                f"got {len(self.layer_types)}"
            )
        for kind in self.layer_types:
            if kind not in ("full_attention", "sliding_attention"):
                raise ConfigError(
                    f"layer_types: expected 'full_attention' or 'sliding_attention', "
                    f"got {shown(kind)}"
                )
            if kind == "sliding_attention" and self.sliding_window is None:
                raise ConfigError("sliding_window: missing, and layer_types asks for it")

    def _check_token_ids(self) -> None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(self, name)
            several = name == "eos_token_id" and isinstance(ids, tuple)
            for token in ids if several else () if ids is None else (ids,):
                if isinstance(token, bool) or not isinstance(token, int):
                    raise ConfigError(f"{name}: expected an integer, got {shown(token)}")

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
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def o_bias(self) -> bool:
        """Whether the output projection of attention has a bias."""
        return self.attention_bias and self.model_type != "qwen2"

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
            Plain JSON values; `from_json` gives this config back. What transformers' class of the
            family does not read, such as the window of a Llama, is under ``llama_layers``: only
            this library reads it.

        Examples
        --------
        >>> from llama_layers import LlamaConfig
        >>> config = LlamaConfig.llama3_1_8b()
        >>> LlamaConfig.from_json(config.to_json()) == config
        True
        """
        content: dict[str, Any] = {"architectures": [MODEL_TYPES[self.model_type]]}
        own = {}
        for field in fields(self):
            value = getattr(self, field.name)
            value = list(value) if isinstance(value, tuple) else value
            if field.name not in unread_fields(self.model_type):
                content[field.name] = value
            elif value != field.default:
                own[field.name] = value
        if self.rope_scaling is not None:
            content["rope_scaling"] = {
                key: value for key, value in vars(self.rope_scaling).items() if value is not None
            }
        content["torch_dtype"] = content.pop("dtype")
        if self.model_type == "qwen2":
            content["use_sliding_window"] = self.sliding_window is not None
            content["max_window_layers"] = 0  # the first layers without a window; none of them
        if self.layer_types is None:
            content.pop("layer_types", None)
        if own:
            content[OWN_KEY] = own
        return content


def read_config(directory: Path) -> tuple[LlamaConfig, tuple[str, ...]]:
    """Read the config.json of a checkpoint, and say which of its keys were not read."""
    config, unread, content = _read(path := directory / "config.json")
    try:
        refuse_other_heads(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {str(error).removeprefix('config: ')}") from None
    return config, unread


def _read(path: Path) -> tuple[LlamaConfig, tuple[str, ...], Mapping[str, Any]]:
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise ConfigError(f"{path}: expected at most {_MOST_BYTES} bytes, got {size}")
    content = read_json(path, ConfigError)
    try:
        return *_built(content), content
    except ConfigError as error:
        raise ConfigError(f"{path}: {str(error).removeprefix('config: ')}") from None


def _built(content: Mapping[str, Any]) -> tuple[LlamaConfig, tuple[str, ...]]:
    arguments, unread = constructor_arguments(content)
    config = LlamaConfig(**arguments)
    refuse_other_maths(unread, config, content)
    return config, tuple(key for key, value in unread.items() if value is not None)


# A published config has a few kilobytes, or some megabytes where each of a hundred thousand tokens
# has a label; one that is larger would take time and memory to say nothing.
_MOST_BYTES = 16 * 2**20
_COUNTS = """
vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
head_dim max_position_embeddings
""".split()

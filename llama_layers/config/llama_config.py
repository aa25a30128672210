"""The config of a model: its fields with their checks, read from config.json and written to it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_layers.config.config_file import constructor_arguments
from llama_layers.config.families import FAMILIES, SWITCHES
from llama_layers.config.fields import Fields
from llama_layers.config.file_content import file_content
from llama_layers.config.presets import PublishedSizes
from llama_layers.config.refusals import refuse_other_heads, refuse_other_maths
from llama_layers.errors import ConfigError
from llama_layers.files.json_files import read_json

# A published config has a few kilobytes, or some megabytes where each of a hundred thousand tokens
# has a label; a larger one would take time and memory to say nothing.
_MOST_BYTES = 16 * 2**20


@dataclass(frozen=True)
class LlamaConfig(Fields, PublishedSizes):
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
    layer_rope_theta : tuple of float or None
        The base of each layer, if they differ; 0 for a layer without RoPE.
    sliding_rope_scaling : bool
        Whether `rope_scaling` is for layers with a window, too.
    partial_rotary_factor : float
        Which part of each head's channels is rotated, the first of them.
    llama_4_scaling_beta : float
        How much the queries of tokens beyond the trained context grow, see `query_temperature`.
    llama_4_scaling_context : int or None
        That context, where `rope_scaling` does not have it; `max_position_embeddings` if None.
    sliding_window : int or None
        How many tokens back a token attends, itself included. A config of your own may have it in
        every family; `from_json` reads it where transformers does, not for "llama".
    layer_types : tuple of str or None
        "full_attention" or "sliding_attention" for each layer; None applies `sliding_window` to
        all of them.
    attention_bias : bool
        Whether the four attention projections have biases, or in some families those into
        queries, keys and values only.
    mlp_bias : bool
        Whether the three MLP projections have biases.
    tie_word_embeddings : bool
        Whether the head is the embedding.
    hidden_act : {"silu", "gelu_pytorch_tanh"}
        What is made of the gate of the MLP; the family's if not given.
    model_type : str
        The family, as its files name it. Qwen2 has biases on queries, keys and values whatever
        `attention_bias` says.
    norm_placement : {"before", "after", "both"}
        Whether the input of attention and of the MLP is normalised, or what they add to the
        residual stream, or both. This and the next three are the family's if not given.
    qk_norm : {"none", "head", "full"}
        Whether queries and keys are normalised, each head by itself or the whole projection.
    qk_norm_weight : bool
        Whether these norms have weights.
    qk_norm_after_rope : bool
        Whether they come after RoPE, not before it.
    attention_out_bias : bool or None
        Whether the output projection of attention has a bias; None if `attention_bias` says so.
    attention_sinks : bool
        Whether each query head has a number that joins its scores in the softmax, and no value.
    embedding_multiplier : float
        What the embedding's rows are multiplied by.
    embedding_multiplier_rounded : bool
        Whether that number is rounded to the dtype of the weights first.
    attention_multiplier : float or None
        What the products of queries and keys are multiplied by; ``1 / sqrt(head_dim)`` if None.
    residual_multiplier : float
        What the results of attention and of the MLP are multiplied by before they are added.
    logits_scaling : float
        What the logits are divided by; what they are multiplied by in HyperCLOVA X.
    norm_weight_offset : float
        What is added to the weights of all norms: 1 in Gemma, whose files hold weights less 1.
    attn_logit_softcapping, final_logit_softcapping : float or None
        A cap c of the scores of attention, or of the logits, which become c tanh(y / c).
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
        if self.attention_out_bias is not None:
            return self.attention_out_bias
        return self.attention_bias and FAMILIES[self.model_type].output_bias

    @property
    def attention_scale(self) -> float:
        """What the products of queries and keys are multiplied by."""
        if self.attention_multiplier is not None:
            return self.attention_multiplier
        return 1 / math.sqrt(self.head_dim)

    @property
    def multiplies_logits(self) -> bool:
        """Whether `logits_scaling` multiplies the logits, instead of dividing them."""
        return FAMILIES[self.model_type].multiplies_logits

    @property
    def changes_logits(self) -> bool:
        """Whether the logits are not what the head gives."""
        return self.logits_scaling != 1 or self.final_logit_softcapping is not None

    @property
    def norms_before(self) -> bool:
        """Whether the input of attention and of the MLP is normalised."""
        return self.norm_placement != "after"

    @property
    def norms_after(self) -> bool:
        """Whether what attention and the MLP add to the residual stream is normalised."""
        return self.norm_placement != "before"

    @property
    def qk_norm_before_rope(self) -> bool:
        """Whether queries and keys are normalised before RoPE."""
        return self.qk_norm != "none" and not self.qk_norm_after_rope

    @property
    def qk_norm_weights(self) -> bool:
        """Whether there are norms of queries and keys that have weights."""
        return self.qk_norm != "none" and self.qk_norm_weight

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
        TypeError
            If it is neither a path nor a mapping.

        Examples
        --------
        >>> from llama_layers import LlamaConfig
        >>> LlamaConfig.from_json({"model_type": "llama", "hidden_size": 64})
        Traceback (most recent call last):
        llama_layers.errors.ConfigError: config: missing vocab_size, intermediate_size, ...
        """
        if isinstance(path_or_dict, Mapping):
            return _built(path_or_dict)[0]
        if not isinstance(path_or_dict, str | os.PathLike):
            raise TypeError(
                f"path_or_dict: expected a path or a mapping, got {type(path_or_dict).__name__}"
            )
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
        return file_content(self)


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


def with_layers(config: LlamaConfig, count: int) -> LlamaConfig:
    """Change the number of layers of a config, repeating the kinds of its first ones."""

    def repeated(kinds: tuple[Any, ...] | None) -> Any:
        return kinds and tuple(kinds[layer % len(kinds)] for layer in range(count))

    return replace(
        config,
        num_hidden_layers=count,
        layer_types=repeated(config.layer_types),
        layer_rope_theta=repeated(config.layer_rope_theta),
    )

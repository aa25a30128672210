"""Traces of llama.cpp, through llama-cpp-python's low-level API and its callback for each tensor.

The scheduler asks about each tensor of the graph before it computes it, and shows those that are
wanted when they are computed (``cb_eval`` of ``llama_context_params``).
"""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike

from llama_layers.arrays.types import Namespace
from llama_layers.checkpoint import open_checkpoint
from llama_layers.checkpoint.names import from_gguf
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.sites import LOGITS, Site, sites
from llama_layers.verify.fit import ROTATED, in_halves
from llama_layers.verify.trace import Trace

# enum ggml_type
_DTYPES = {0: np.float32, 1: np.float16, 30: ml_dtypes.bfloat16}
# enum llama_rope_type
_LAYOUTS = {0: "interleaved", 2: "half"}
# What llama.cpp calls the tensors of sites without a weight, with | between names by preference. A
# name within a layer ends in its number.
_NAMES = {
    "model.embed_tokens": "inp_scaled|embd|inp_embd",
    "self_attn.q_rope": "Qcur_attn_temp_scaled|rotated Qcur|Qcur",
    "self_attn.k_rope": "rotated Kcur|Kcur",
    "self_attn.attention": "kqv_out",
    "attention_residual": "ffn_inp|sa_out",
    "mlp.act": "ffn_swiglu|ffn_geglu|ffn_gate_par",
    "layer": "l_out",
    LOGITS: "result_output",
}
# The families whose queries llama.cpp multiplies by the scale of the scores beforehand.
_SCALED = frozenset({"phi3", "gemma", "gemma2", "gemma3_text"})
_NAMED = frozenset(name for names in _NAMES.values() for name in names.split("|"))


class _Tensor(ctypes.Structure):
    """struct ggml_tensor of ggml.h, as far as it is read here."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
    )


def record_llama_cpp(
    path: str | os.PathLike[str],
    input_ids: ArrayLike,
    /,
    *,
    kv_cache: str = "float16",
    flash_attention: bool = False,
) -> Trace:
    """Run a GGUF file in llama.cpp and keep the array of every site.

    Parameters
    ----------
    path : str or path
        The GGUF file.
    input_ids : array of integers, shape [B, S]
        Token ids. Each row is a run of its own, without padding.
    kv_cache : {"float16", "float32"}, optional
        The format of cached keys and values, which llama.cpp attends to: its own default, or one
        that rounds nothing.
    flash_attention : bool, optional
        Whether to use the fused kernel, which has its own roundings.

    Returns
    -------
    Trace
        With queries and keys in the order of Hugging Face's heads.

    Raises
    ------
    ImportError
        If llama-cpp-python or gguf is not installed.
    ValueError
        If an argument has a wrong shape or dtype.
    CheckpointError, ConfigError
        If the file is not a GGUF file of a model that `load` can read.
    RuntimeError
        If llama.cpp cannot load or run it, or does not show a site under the names that are known.

    Notes
    -----
    Written against llama-cpp-python 0.3.36. Names of tensors and the beginning of ``struct
    ggml_tensor`` are llama.cpp's own affair and change without notice; what does not fit is
    refused.

    Examples
    --------
    >>> from llama_layers import load
    >>> from llama_layers.verify import check
    >>> from llama_layers.verify.recorders import record_llama_cpp
    >>> trace = record_llama_cpp("model.gguf", [[1, 2, 3]])  # doctest: +SKIP
    >>> check(trace, load("model.gguf")).verdict  # doctest: +SKIP
    'WARN'
    """
    if kv_cache not in (formats := {"float32": 0, "float16": 1}):
        raise ValueError(f"kv_cache: expected 'float16' or 'float32', got {kv_cache!r}")
    config = open_checkpoint(path).config
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        raise ValueError(
            f"input_ids: expected integers in shape [B, S], got {ids.dtype} in {list(ids.shape)}"
        )
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(
            f"input_ids: expected ids from 0 to {config.vocab_size - 1}, got {ids.min()} to "
            f"{ids.max()}"
        )
    try:
        api = importlib.import_module("llama_cpp")
    except ModuleNotFoundError as error:
        if error.name != "llama_cpp":
            raise
        raise ImportError(
            "record_llama_cpp needs the package llama-cpp-python: pip install llama-cpp-python",
            name="llama_cpp",
        ) from None
    callback = _Callback()
    rows = []
    with _model(api, path) as model:
        layout = _LAYOUTS.get(api.llama_model_rope_type(model))
        if layout is None:
            raise RuntimeError(f"{path}: expected RoPE that rotates pairs of a head's numbers")
        for row in ids:
            callback.tensors.clear()
            with _context(api, model, len(row), callback, formats[kv_cache], flash_attention) as c:
                status = _decode(api, c, row)
            if callback.error is not None:
                raise RuntimeError(f"{path}: {callback.error}") from callback.error
            if status:
                raise RuntimeError(f"{path}: llama_decode: expected 0, got {status}")
            rows.append(_arrays(callback.tensors, config, len(row), layout))
    return Trace(
        {name: np.concatenate([row[name] for row in rows]) for name in rows[0]},
        input_ids=ids,
        metadata={
            "engine": f"llama.cpp in llama-cpp-python {version('llama-cpp-python')}",
            "config": json.dumps(config.to_json()),
            "kv_cache": kv_cache,
            "flash_attention": "yes" if flash_attention else "no",
            "scaled_queries": "yes" if config.model_type in _SCALED else "no",
            "system": api.llama_print_system_info().decode(),
        },
    )


@contextmanager
def _model(api: Namespace, path: str | os.PathLike[str]) -> Iterator[Any]:
    model = api.llama_model_load_from_file(os.fsencode(path), api.llama_model_default_params())
    if not model:
        raise RuntimeError(f"{path}: llama.cpp cannot load it; it says why on stderr")
    try:
        yield model
    finally:
        api.llama_model_free(model)


@contextmanager
def _context(
    api: Namespace, model: Any, count: int, callback: _Callback, kv_type: int, flash_attention: bool
) -> Iterator[Any]:
    """Open a context that computes `count` tokens at once."""
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = count
    params.type_k = params.type_v = kv_type
    params.flash_attn_type = int(flash_attention)
    params.cb_eval = api.ggml_backend_sched_eval_callback(callback)
    context = api.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("llama.cpp cannot make a context; it says why on stderr")
    try:
        yield context
    finally:
        api.llama_free(context)


def _decode(api: Namespace, context: Any, row: np.ndarray) -> int:
    batch = api.llama_batch_init(len(row), 0, 1)
    try:
        batch.n_tokens = len(row)
        for place, token in enumerate(row):
            batch.token[place] = int(token)
            batch.pos[place] = place
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = 0
            batch.logits[place] = 1  # of every token
        return int(api.llama_decode(context, batch))
    finally:
        api.llama_batch_free(batch)


class _Callback:
    """A callback that keeps the tensors of sites, by what they are called here."""

    def __init__(self) -> None:
        self.tensors: dict[str, np.ndarray] = {}
        self.error: Exception | None = None
        self._ggml = _ggml()

    def __call__(self, address: int, asking: bool, _: object) -> bool:
        try:
            wanted = self._wanted(address)
            if not asking:
                for name, source in wanted.items():
                    self.tensors[name] = self._array(name, source)
        except Exception as error:  # which would be lost on its way through C
            self.error = error
            return False
        return bool(wanted) or not asking

    def _wanted(self, address: int) -> dict[str, int]:
        """Return what to keep when a tensor is computed: addresses by name.

        A product or sum has the name of the weight or bias in it, as in the file, since llama.cpp
        gives one name to several tensors, and none to some.
        """
        name = self._called(address)
        sources = _Tensor.from_address(address).src
        first, second = (self._called(source) for source in sources[:2])
        found = {}
        if second == "inp_pos":
            found[f"rotated {name}"] = address
        if name.rpartition("-")[0] in _NAMED or name in _NAMED:
            found[name] = address
        for source in (first, second):
            weight = re.fullmatch(r"(.+)\.(?:weight|bias)", source)
            if weight and weight[1] != "token_embd":
                found[weight[1]] = address
        if second == "result_norm":  # its weight may be that of the embedding
            found["output"] = address
        if norm := re.fullmatch(r"blk\.(\d+)\.ffn_norm\.weight", second):
            # Its input has no name in some architectures, and is still needed.
            found[f"ffn_inp-{norm[1]}"] = _Tensor.from_address(sources[0]).src[0]
        return found

    def _called(self, address: int | None) -> str:
        return str(self._ggml.ggml_get_name(address).decode()) if address else ""

    def _array(self, name: str, address: int) -> np.ndarray:
        tensor = _Tensor.from_address(address)
        if tensor.type not in _DTYPES:
            raise RuntimeError(f"{name}: expected floats, got ggml_type {tensor.type}")
        dtype = np.dtype(_DTYPES[tensor.type])
        shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
        size = self._ggml.ggml_nbytes(address)
        reach = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if reach + dtype.itemsize != size:
            raise RuntimeError(f"{name}: struct ggml_tensor is not the one that is known")
        numbers = np.empty(size, np.uint8)
        self._ggml.ggml_backend_tensor_get(address, numbers.ctypes.data, 0, size)
        return np.ndarray(shape, dtype, numbers, strides=strides).copy()


def _ggml() -> Any:
    """Load the library of tensors, and declare the types of its functions."""
    library = importlib.import_module("llama_cpp._ggml").libggml
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for name, result, arguments in (
        ("ggml_get_name", ctypes.c_char_p, [pointer]),
        ("ggml_nbytes", size, [pointer]),
        ("ggml_backend_tensor_get", None, [pointer, pointer, size, size]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _arrays(
    tensors: dict[str, np.ndarray], config: LlamaConfig, count: int, layout: str
) -> dict[str, np.ndarray]:
    """Return the sites of one run."""
    found = _parts(tensors, config)
    by_module = {
        module.removesuffix(".weight"): name
        for name in found
        if (module := from_gguf(f"{name}.weight", config.model_type)) is not None
    }
    arrays = {}
    for site in sites(config):
        if site.optional:
            continue
        names = [by_module.get(site.name), *_names_of(site)]
        array = next((found[name] for name in names if name in found), None)
        if array is None:
            raise RuntimeError(
                f"{site.name}: llama.cpp showed no tensor of its name; this version may name it "
                "otherwise"
            )
        shape = (1, count, *(axis for axis in site.shape if isinstance(axis, int)))
        if array.size != math.prod(shape):
            raise RuntimeError(
                f"{site.name}: expected shape {list(shape)}, got {list(array.shape)}"
            )
        array = array.reshape(shape)
        rotated = layout == "interleaved" and site.role in ROTATED
        arrays[site.name] = in_halves(array, config) if rotated else array
    return arrays


def _names_of(site: Site) -> list[str]:
    """What llama.cpp calls the tensors of a site that has no weight, in the order of preference."""
    names = _NAMES.get(site.name if site.layer is None else site.role, "")
    return [f"{name}-{site.layer}" if site.layer is not None else name for name in names.split("|")]


def _parts(tensors: dict[str, np.ndarray], config: LlamaConfig) -> dict[str, np.ndarray]:
    """Return the tensors, with products of fused weights in their parts."""
    found = dict(tensors)
    q = config.num_attention_heads * config.head_dim
    k = config.num_key_value_heads * config.head_dim
    inner = config.intermediate_size
    for name, array in tensors.items():
        layer, _, module = name.rpartition(".")
        if module == "attn_qkv":
            for part, rows in zip("qkv", np.split(array, [q, q + k], axis=-1), strict=True):
                found[f"{layer}.attn_{part}"] = rows
        if module == "ffn_up" and array.shape[-1] == 2 * inner:
            found[f"{layer}.ffn_gate"], found[name] = np.split(array, 2, axis=-1)
    return found

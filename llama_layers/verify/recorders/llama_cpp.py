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
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike

from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Namespace
from llama_layers.checkpoint import open_checkpoint
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.sites import HEAD, LOGITS, sites
from llama_layers.verify.aliases import canonical_arrays, schemes_of
from llama_layers.verify.fit import ROTATED, in_halves
from llama_layers.verify.trace import Trace

# enum ggml_type
_DTYPES = {0: np.float32, 1: np.float16, 30: ml_dtypes.bfloat16}
# enum llama_rope_type
_LAYOUTS = {0: "interleaved", 2: "half"}


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
    """A callback that keeps the tensors of sites, in the order in which they are computed."""

    def __init__(self) -> None:
        self.tensors: list[tuple[str, np.ndarray]] = []
        self.error: Exception | None = None
        self._ggml = _ggml()

    def __call__(self, address: int, asking: bool, _: object) -> bool:
        try:
            name = self._name(address)
            if not asking and name is not None:
                self.tensors.append((name, self._array(name, address)))
        except Exception as error:  # which would be lost on its way through C
            self.error = error
            return False
        return name is not None or not asking

    def _name(self, address: int) -> str | None:
        """Return a tensor's name, if it may be a site's."""
        name = str(self._ggml.ggml_get_name(address).decode())
        # The product with the output projection has a name in some architectures only.
        source = _Tensor.from_address(address).src[1]
        of = self._ggml.ggml_get_name(source).decode() if source else ""
        if of.startswith("kqv_out-"):
            name = of.replace("kqv_out", "attn_out")
        # Probabilities are over a cache that is longer than the text, and large.
        return name if "llama.cpp" in schemes_of(name) and "soft_max" not in name else None

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
    tensors: list[tuple[str, np.ndarray]], config: LlamaConfig, count: int, layout: str
) -> dict[str, np.ndarray]:
    """Return the sites of one run, from its tensors in the order of computation."""
    numbered: dict[str, np.ndarray] = {}
    for place, (name, array) in enumerate(tensors):
        numbered[f"{name}#{place}" if "-" in name else name] = array
    for name in [n for n in numbered if "_b-" in n]:  # with its bias, instead of the one without
        plain = name.partition("#")[0].replace("_b-", "-")
        numbered = {n: a for n, a in numbered.items() if n.partition("#")[0] != plain}
    if "inp_scaled" in numbered:
        numbered = {n: a for n, a in numbered.items() if n not in ("embd", "inp_embd")}
    found = dict(canonical_arrays(numbered, config.model_type))
    skipped = set()
    if config.changes_logits:  # the head's product has no name of its own
        found[LOGITS] = found.pop(HEAD)
        skipped = {HEAD}
    arrays = {}
    for site in sites(config):
        if site.optional or site.name in skipped:
            continue
        if site.name not in found:
            raise RuntimeError(
                f"{site.name}: llama.cpp showed no tensor of its name; this version may name it "
                "otherwise"
            )
        shape = (1, count, *(axis for axis in site.shape if isinstance(axis, int)))
        array = to_numpy(found[site.name])
        if array.size != math.prod(shape):
            raise RuntimeError(
                f"{site.name}: expected shape {list(shape)}, got {list(array.shape)}"
            )
        array = array.reshape(shape)
        rotated = layout == "interleaved" and site.role in ROTATED
        arrays[site.name] = in_halves(array, config) if rotated else array
    return arrays

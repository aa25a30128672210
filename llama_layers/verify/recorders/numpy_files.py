"""Traces in NumPy's files."""

from __future__ import annotations

import os
from pathlib import Path

from llama_layers.verify.array_files import open_arrays
from llama_layers.verify.trace import Trace, trace_of


def read_arrays(path: str | os.PathLike[str], /) -> Trace:
    """Open .npy and .npz files; each array is read when it is used.

    Parameters
    ----------
    path : str or path
        An .npz file, or a directory of .npy and .npz files (others in it are left alone). The name
        of an array is that of its .npy file, or its name inside an .npz file: a site's, in any
        scheme that `Trace` knows, or ``input_ids``, ``positions`` or ``attention_mask``. Where it
        ends in ".bfloat16" the array holds the bits of bfloat16 numbers as uint16. A directory may
        hold a ``metadata.json``: an object of texts, except for "config", which may be an object.

    Returns
    -------
    Trace
        What the files hold. Nothing pickled is read.

    Raises
    ------
    TraceError
        If a file is malformed or holds Python objects, two arrays have one name, or none is there.
    FileNotFoundError
        If there is no such file.

    Examples
    --------
    >>> import numpy as np, pathlib, tempfile
    >>> from llama_layers.verify.recorders import read_arrays
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     for name in ("attn_norm-0", "l_out-0"):
    ...         np.save(pathlib.Path(directory, name), np.ones((3, 8), np.float32))
    ...     sorted(read_arrays(directory).arrays)
    ['model.layers.0', 'model.layers.0.input_layernorm']
    """
    file = Path(path)
    return trace_of(file, *open_arrays(file))

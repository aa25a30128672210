"""CUDA C run on a CPU: compiled with `emulate.h` in front, and called as a GPU would be."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

HEADER = Path(__file__).with_name("emulate.h")
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\(")
# Undefined behaviour of which a GPU makes errors too; emulate.h has the handlers.
CHECKS = "-fsanitize=alignment,bounds,null"
LINK = "-Wl,-Bsymbolic"
MOST_THREADS = 1024


class EmulatedError(AssertionError):
    """What a GPU would not have survived, or nobody could have relied on."""


@cache
def compiler() -> tuple[str, ...] | None:
    """A C++ compiler: the system's, or the one that the package ziglang brings; None without."""
    for name in ("g++", "clang++"):
        if (found := shutil.which(name)) is not None:
            return (found,)
    return None if find_spec("ziglang") is None else (sys.executable, "-m", "ziglang", "c++")


def emulates() -> bool:
    """Whether kernels can be emulated here."""
    return compiler() is not None and sys.platform == "linux"


needs_compiler = pytest.mark.skipif(
    not emulates(),
    reason="needs Linux and g++, clang++ or the package ziglang",
)
emulated = [pytest.mark.emulated, needs_compiler]
"""Marks for a module whose tests all run on the stand-in."""


class Emulated:
    """The kernels of a CUDA C source."""

    def __init__(self, source: str, options: tuple[str, ...] = ()) -> None:
        names = KERNEL.findall(source)
        calls = "".join(f"\nEMULATED_KERNEL({name})" for name in names)
        self._library = ctypes.CDLL(str(_compiled(source + calls, options)))
        self.kinds: dict[str, str] = {}
        for name in names:
            self._function("run", name).restype = ctypes.c_char_p
            kinds = self._function("kinds", name)
            kinds.restype = ctypes.c_char_p
            self.kinds[name] = kinds().decode()

    def _function(self, what: str, name: str) -> ctypes._CFuncPtr:
        return getattr(self._library, f"emulated_{what}_{name}")

    def run(
        self,
        name: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        values: list[int | float],
        *,
        shared: int = 0,
        seed: int = 0,
    ) -> None:
        """Run a kernel; values are pointers and numbers, in the order of its parameters."""
        kinds = self.kinds[name]
        if len(values) != len(kinds):
            raise TypeError(f"{name}: expected {len(kinds)} arguments, got {len(values)}")
        grid, block = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
        if not 0 < block[0] * block[1] * block[2] <= MOST_THREADS or min(grid) < 1:
            raise ValueError(f"{name}: no GPU has blocks of {block} in a grid of {grid}")
        packed = [
            ctypes.create_string_buffer(struct.pack(kind, value), 8)
            for kind, value in zip(kinds, values, strict=True)
        ]
        addresses = (ctypes.c_void_p * len(packed))(*map(ctypes.addressof, packed))
        triple = ctypes.c_uint * 3
        problem = self._function("run", name)(
            addresses, triple(*grid), triple(*block), ctypes.c_size_t(shared), ctypes.c_uint64(seed)
        )
        if problem is not None:
            raise EmulatedError(f"{name}: {problem.decode()}")


def _compiled(source: str, options: tuple[str, ...]) -> Path:
    """The shared library of a source, made once a machine."""
    cxx = compiler()
    assert cxx is not None
    command = [*cxx, "-std=c++17", "-O2", "-fPIC", "-fno-strict-aliasing", "-w"]
    command += ["-U_FORTIFY_SOURCE", "-ffp-contract=off", CHECKS, *options]
    text = f'#line 1 "emulate.h"\n{HEADER.read_text()}\n#line 1 "kernel.cu"\n{source}\n'
    key = hashlib.sha256("\n".join([*command, text, LINK]).encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"llama_layers_emulated_{os.getuid()}"
    library = folder / f"{key}.so"
    if not library.exists():
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            code, made, linked = (Path(work) / f"kernel.{end}" for end in ("cpp", "o", "so"))
            code.write_text(text)
            _run([*command, "-c", code, "-o", made])
            # Linked without the sanitizer's library, whose handlers emulate.h replaces; and a
            # kernel's name means the kernel, also where the C library has a function of that name.
            _run([*cxx, "-shared", LINK, made, "-o", linked])
            linked.rename(library)
    return library


def _run(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulatedError(f"the kernel does not compile:\n{done.stderr[-4000:]}")

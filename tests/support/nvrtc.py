"""NVIDIA's run-time compiler, which needs no GPU and no driver: what it makes of a kernel."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

PACKAGES = {"12": "nvidia-cuda-nvrtc-cu12", "13": "nvidia-cuda-nvrtc"}

ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes of a multiprocessor."""

    registers: int
    """A thread."""
    local: int
    """Bytes a thread in slow memory, for arrays and what did not fit into registers."""
    shared: int
    """Bytes a block, apart from what the launch adds."""


@cache
def library(cuda: str) -> Any | None:
    """NVRTC of that major version of CUDA; None if its package is not installed."""
    try:
        files = metadata.files(PACKAGES[cuda]) or []
    except metadata.PackageNotFoundError:
        return None
    (path,) = (file for file in files if file.name == f"libnvrtc.so.{cuda}")
    return ctypes.CDLL(str(path.locate()))


def compile_kernels(
    cuda: str, architecture: str, source: str, options: tuple[str, ...] = ()
) -> dict[str, Resources]:
    """Compile to machine code, and read what the assembler says of each kernel."""
    nvrtc = library(cuda)
    program = ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), None, 0, None, None))
    try:
        given = [f"-arch={architecture}", "--ptxas-options=-v", *options]
        encoded = (ctypes.c_char_p * len(given))(*(option.encode() for option in given))
        status = nvrtc.nvrtcCompileProgram(program, len(given), encoded)
        log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if status or "warning" in log or "error" in log:
        raise RuntimeError(f"NVRTC {cuda} for {architecture}:\n{log}")
    found = {}
    for name, stack, stores, loads, registers, rest in ENTRY.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        local = max(int(stack), int(stores), int(loads))
        found[name] = Resources(int(registers), local, int(shared[1]) if shared else 0)
    return found


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"NVRTC: error {status}")


def _text(size_of: Any, get: Any, program: Any) -> str:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(get(program, text))
    return text.value.decode()

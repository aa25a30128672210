"""The kind of a file that is not the one expected, by its first bytes."""

from __future__ import annotations

from pathlib import Path

REWRITE = "write the model as safetensors with transformers' from_pretrained and save_pretrained"
_PYTORCH = f"which can run code and is not read: {REWRITE}"
_LFS = b"version https://git-lfs.github.com/spec/"
_WEB = (b"<!doctype html", b"<html", b"<?xml")
_LONGEST = 64  # bytes that tell all kinds apart


def kind_of_file(file: Path) -> str | None:
    """Say what a file is, and what to do with it; None if its first bytes do not tell."""
    if not file.is_file():  # reading a FIFO would wait
        return None
    with file.open("rb") as stream:
        return kind_of(stream.read(_LONGEST))


def kind_of(first: bytes) -> str | None:
    """Say what a file with these first bytes is, and what to do with it; None if unknown."""
    if not first:
        return "an empty file"
    if first.startswith(_LFS):
        return "a Git LFS pointer, not the file itself: run `git lfs pull`"
    if first[:_LONGEST].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_WEB):
        return "a web page: the download failed, fetch the file again"
    if first.startswith(b"GGUF"):
        return "a GGUF file: rename it to end in .gguf"
    if is_safetensors(first):
        return "a safetensors file: rename it to end in .safetensors"
    if first.startswith(b"PK\x03\x04"):
        return f"a zip archive, as PyTorch writes them, {_PYTORCH}"
    if first[0] == 0x80 and first[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return f"a pickle, as PyTorch writes them, {_PYTORCH}"
    return None


def is_safetensors(first: bytes) -> bool:
    """Whether a file begins with a length below 2^32 and an object of JSON."""
    return first[4:9] == b"\0\0\0\0{"

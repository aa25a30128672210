"""The order of the package's rooms, read from its sources: imports point one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "llama_layers"

# Each room may import those before it, and its neighbours on the same floor.
FLOORS = (
    ("errors", "lazy", "version"),
    ("arrays", "files"),
    ("config",),
    ("layers",),
    ("model",),
    ("backends",),
    ("parallel",),
    ("checkpoint",),
    ("verify",),
    ("testing", "bench", "trial"),
    ("cli",),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

# What stands above and is loaded by name, here alone, when it is first needed.
LOADED_BY_NAME = {
    ("llama_layers.arrays.dispatch", "llama_layers.backends."),
    ("llama_layers.backends.trust", "llama_layers.trial"),
}
# Libraries that need not be installed: a function may import them.
OPTIONAL = frozenset(
    "cupy gguf huggingface_hub jax matplotlib mpi4py numba threadpoolctl tokenizers torch".split()
)
# Needed, but slow to load, and for few calls only: so may these be.
SLOW_TO_LOAD = frozenset({"array_api_compat", "jinja2", "rich"})
# A module that loads one of them, from where it is needed late.
LATE = "llama_layers.checkpoint.tokenizer.sandbox"
# A command loads what it needs once it was chosen, so that --help answers at once.
LOAD_LATE = "llama_layers.cli"

MATHS = ("layers", "model")
ARRAY_LIBRARIES = frozenset({"cupy", "jax", "mlx", "numba", "torch"})  # numpy is main memory
MAX_LINES = 400


@dataclass(frozen=True)
class Import:
    """One module that another imports."""

    by: str
    line: int
    name: str
    hidden: bool
    """Inside a function."""

    def __str__(self) -> str:
        return f"{self.by}:{self.line} imports {self.name}"


class Package:
    """The sources below a directory, as modules."""

    def __init__(self, root: Path) -> None:
        self.paths = {_module(path, root): path for path in (root / PACKAGE).rglob("*.py")}
        self.trees = {name: ast.parse(path.read_text()) for name, path in self.paths.items()}
        self.imports = [found for name in self.paths for found in self._imports(name)]

    def _imports(self, module: str) -> Iterator[Import]:
        for node, hidden in _nodes(self.trees[module]):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(module, node)
                names = [
                    name if (name := f"{base}.{alias.name}") in self.paths else base
                    for alias in node.names
                ]
            for name in names:
                yield Import(module, node.lineno, name, hidden)

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        up = node.level - (self.paths[module].name == "__init__.py")
        return ".".join([*parts[: len(parts) - up], *filter(None, [node.module])])

    def upward(self) -> list[str]:
        """Imports of a room on a higher floor."""
        return [
            str(found)
            for found in self.imports
            if _is_ours(found.name)
            and (by := _room(found.by)) is not None
            and FLOOR_OF[by] < _floor(found.name)
        ]

    def unknown_rooms(self) -> set[str]:
        """Rooms that are on no floor."""
        return {room for name in self.paths if (room := _room(name)) is not None} - set(FLOOR_OF)

    def circle(self) -> list[str]:
        """Modules that import each other, at any time; none if there is no circle."""
        graph: dict[str, set[str]] = {name: set() for name in self.paths}
        for found in self.imports:
            if found.name in self.paths and found.name != found.by:
                # An import runs the packages around a module, too, unless they run already.
                outer = found.name.split(".")
                around = {".".join(outer[:n]) for n in range(2, len(outer) + 1)}
                graph[found.by] |= {m for m in around if not f"{found.by}.".startswith(f"{m}.")}
        try:
            list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            return list(error.args[1])
        return []

    def hidden(self) -> list[str]:
        """Imports in functions of what is not optional."""
        return [
            str(found)
            for found in self.imports
            if found.hidden
            and not found.by.startswith(LOAD_LATE)
            and found.name != LATE
            and found.name.partition(".")[0] not in OPTIONAL | SLOW_TO_LOAD
        ]

    def loaded_by_name(self) -> set[tuple[str, str]]:
        """Modules of ours that are loaded by their names, with who does."""
        return {
            (module, name)
            for module, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__")
            for name in map(_beginning, node.args[:1])
            if _is_ours(name)
        }

    def library_names(self) -> list[str]:
        """Places in the maths rooms that name an array library."""
        return [
            f"{module}:{node.lineno} names {name}"
            for module, tree in self.trees.items()
            if _room(module) in MATHS
            for node in ast.walk(tree)
            for name in _names(node)
            if name.partition(".")[0] in ARRAY_LIBRARIES
        ]


def _module(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(module: str) -> str | None:
    """The room of a module; None for the package itself, which stands above all."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and not parts[1].startswith("__") else None


def _floor(name: str) -> int:
    room = _room(name)
    return len(FLOORS) if room is None else FLOOR_OF.get(room, len(FLOORS))


def _is_ours(name: str) -> bool:
    return f"{name}.".startswith(f"{PACKAGE}.")


def _nodes(node: ast.AST, hidden: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes below one, and whether they are inside a function."""
    for child in ast.iter_child_nodes(node):
        yield child, hidden
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _nodes(child, hidden or inside)


def _called(node: ast.Call) -> str:
    function = node.func
    return getattr(function, "attr", None) or getattr(function, "id", "")


def _beginning(node: ast.AST) -> str:
    """The text of a string, or of what stands before the first {} of an f-string."""
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    value = getattr(node, "value", None)
    return value if isinstance(value, str) else ""


def _names(node: ast.AST) -> Iterator[str]:
    """Identifiers, imported modules and whole strings."""
    if isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield node.module or ""
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


@pytest.fixture(scope="module")
def ours():
    return Package(ROOT)


def test_every_room_has_a_floor(ours):
    assert ours.unknown_rooms() == set()


def test_imports_point_down(ours):
    assert ours.upward() == []


def test_no_circles(ours):
    assert ours.circle() == []


def test_no_hidden_imports(ours):
    assert ours.hidden() == []


def test_what_is_loaded_by_name(ours):
    assert ours.loaded_by_name() == LOADED_BY_NAME


def test_maths_names_no_array_library(ours):
    assert ours.library_names() == []


def test_no_long_files():
    sources = [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_the_package_itself_loads_nothing_but_the_lazy_loader():
    code = """
import sys
before = set(sys.modules)
import llama_layers
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(new - set(sys.stdlib_module_names)))
print(*sorted(name for name in sys.modules if name.startswith("llama_layers")))
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.splitlines() == [
        "lazy_loader llama_layers", "llama_layers llama_layers.lazy llama_layers.version",
    ]  # fmt: skip


PLANTED = {
    "upward": ("layers/norm.py", "from llama_layers.verify import trace", "upward"),
    "upward for types": (
        "config/schema.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..model import llama",
        "upward",
    ),
    "of the whole package": ("layers/norm.py", "import llama_layers", "upward"),
    "a circle": ("arrays/b.py", "from . import c", "circle"),
    "a circle by a package": ("arrays/b.py", "from llama_layers.files import kinds", "circle"),
    "a hidden circle": ("arrays/b.py", "def f():\n    from llama_layers.arrays import c", "circle"),
    "a hidden import": ("arrays/b.py", "def f():\n    from llama_layers import errors", "hidden"),
    "a hidden dependency": ("arrays/b.py", "async def f():\n    import safetensors", "hidden"),
    "by name": (
        "arrays/b.py", 'import importlib\nimportlib.import_module("llama_layers.cli")',
        "loaded_by_name",
    ),
    "a library's array": ("model/llama.py", "def f(x):\n    return x.torch()", "library_names"),
    "a library": ("layers/norm.py", "import jax.numpy as jnp", "library_names"),
    "a library's name": ("layers/norm.py", 'IS = "cupy"', "library_names"),
    "a room": ("shed/tools.py", "", "unknown_rooms"),
}  # fmt: skip
SOUND = {
    "arrays/c.py": "from llama_layers.arrays.b import f",
    "files/__init__.py": "from llama_layers.arrays import c",
    "files/kinds.py": "import numpy\nfrom . import shared",
    "files/shared.py": '"""Say nothing of torch."""',
    "model/llama.py": "",
    "verify/trace.py": "from ..layers import norm\nfrom llama_layers import errors",
    "cli/bench.py": "def f():\n    from llama_layers.verify import trace",
}


def _package(root: Path, files: dict[str, str]) -> Package:
    names = ["__init__.py", "arrays/b.py", "config/schema.py", "errors.py", "layers/norm.py"]
    for name, text in (dict.fromkeys(names, "") | files).items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Package(root)


ASKED = ("upward", "circle", "hidden", "loaded_by_name", "library_names", "unknown_rooms")


@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_violation_is_found(plant, tmp_path):
    name, text, question = PLANTED[plant]
    assert getattr(_package(tmp_path, SOUND | {name: text}), question)()


def test_a_sound_package(tmp_path):
    sound = _package(tmp_path, SOUND)
    assert not any(getattr(sound, question)() for question in ASKED)

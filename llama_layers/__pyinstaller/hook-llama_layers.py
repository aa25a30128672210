"""What PyInstaller does not see: modules loaded by name, and files that are not modules."""

from importlib.util import find_spec

from PyInstaller.utils.hooks import collect_data_files, collect_submodules, copy_metadata

# Optional libraries that are loaded by name, where they are installed.
_OPTIONAL = ("gguf", "huggingface_hub", "threadpoolctl", "tokenizers")

# Libraries whose versions are asked for.
_VERSIONED = ("numba", "llvmlite", "numpy")

datas = collect_data_files("llama_layers")
for _name in filter(find_spec, _VERSIONED):
    datas += copy_metadata(_name)
hiddenimports = [
    *collect_submodules("llama_layers", lambda name: not name.startswith("llama_layers.testing")),
    *collect_submodules("array_api_compat.numpy"),
    *filter(find_spec, _OPTIONAL),
]

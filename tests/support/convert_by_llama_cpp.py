"""Convert a checkpoint without a tokenizer: ``python convert_by_llama_cpp.py SOURCE MODEL OUT``.

SOURCE is a copy of llama.cpp's sources, whose own gguf package its converter needs. So this runs in
a process of its own.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path


def set_vocab(model):
    model.gguf_writer.add_tokenizer_model("none")
    model.gguf_writer.add_vocab_size(model.hparams["vocab_size"])


def main(source, directory, out):
    sys.path[:0] = [str(source / "gguf-py"), str(source)]
    import gguf
    import torch
    from conversion import get_model_class
    from conversion.base import ModelBase, ModelType, get_model_architecture

    hparams = ModelBase.load_hparams(directory, False)
    # From which the converter of Gemma 3 counts the rows of the embedding.
    vocabulary = {"vocab": {str(i): i for i in range(hparams["vocab_size"])}}
    tokenizer = {"model": vocabulary, "added_tokens": []}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    known = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
    body = {"set_vocab": set_vocab, "model_arch": known.model_arch}
    with torch.inference_mode():
        model = type("Model", (known,), body)(
            directory, gguf.LlamaFileType.ALL_F32, out, eager=True
        )
        if hasattr(model, "impl"):  # Mistral 3's passes all calls on
            model.impl.set_vocab = types.MethodType(set_vocab, model.impl)
        model.write()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

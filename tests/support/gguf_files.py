"""GGUF files made from the published format, without llama_layers and without the gguf package."""

from __future__ import annotations

import json
import re
import struct
from math import prod

import numpy as np

# No vocabulary: the tests give token ids.
NO_TOKENIZER = {"tokenizer.ggml.model": "none"}
# The types of metadata, by the names that llama.cpp's loader logs.
NUMBERS = {
    "u8": (0, "<B"), "i8": (1, "<b"), "u16": (2, "<H"), "i16": (3, "<h"), "u32": (4, "<I"),
    "i32": (5, "<i"), "f32": (6, "<f"), "bool": (7, "<?"), "u64": (10, "<Q"), "i64": (11, "<q"),
    "f64": (12, "<d"),
}  # fmt: skip
STRING, ARRAY = 8, 9
F32, F16 = 0, 1


class Encoder:
    """Bytes of a header, with a note of where each number that says how to read on lies."""

    def __init__(self):
        self.content = bytearray()
        self.lengths = []  # of 8 bytes: lengths, counts, sizes, offsets
        self.types = []  # of 4 bytes: types, numbers of axes

    def u32(self, value):
        self.types.append(len(self.content))
        self.content += struct.pack("<I", value)

    def u64(self, value):
        self.lengths.append(len(self.content))
        self.content += struct.pack("<Q", value)

    def text(self, value):
        raw = value if isinstance(value, bytes) else value.encode()
        self.u64(len(raw))
        self.content += raw

    def number(self, kind, value):
        self.content += struct.pack(NUMBERS[kind][1], value)

    def value(self, kind, value):
        """A value of a kind such as u32, str, arr[str] or arr[f32]."""
        if kind == "str":
            self.u32(STRING)
            self.text(value)
        elif kind.startswith("arr["):
            element = kind[4:-1]
            self.u32(ARRAY)
            self.u32(STRING if element == "str" else NUMBERS[element][0])
            self.u64(len(value))
            for each in value:
                if element == "str":
                    self.text(each)
                else:
                    self.number(element, each)
        else:
            self.u32(NUMBERS[kind][0])
            self.number(kind, value)


def encode(metadata, tensors=(), *, version=3, alignment=32):
    """A GGUF file, for metadata of kind and value by key, and arrays of float32 by name."""
    encoder = Encoder()
    encoder.content += b"GGUF"
    encoder.u32(version)
    encoder.u64(len(tensors))
    encoder.u64(len(metadata))
    for key, (kind, value) in dict(metadata).items():
        encoder.text(key)
        encoder.value(kind, value)
    data = bytearray()
    for name, array in dict(tensors).items():
        data += bytes(-len(data) % alignment)
        encoder.text(name)
        encoder.u32(array.ndim)
        for size in reversed(array.shape):
            encoder.u64(size)
        encoder.u32({"float32": F32, "float16": F16}[array.dtype.name])
        encoder.u64(len(data))
        data += array.tobytes()
    if tensors:
        encoder.content += bytes(-len(encoder.content) % alignment)
        encoder.content += data
    return encoder


def kinds(**metadata):
    """Metadata with the kinds that llama.cpp's converter gives to values of these types."""
    names = {bool: "bool", int: "u32", float: "f32", str: "str"}
    return {key.replace("__", "."): (names[type(value)], value) for key, value in metadata.items()}


# The metadata of what `llama` gives.
MODEL = kinds(
    general__architecture="llama",
    llama__block_count=2,
    llama__context_length=64,
    llama__embedding_length=32,
    llama__feed_forward_length=48,
    llama__attention__head_count=4,
    llama__attention__head_count_kv=2,
    llama__attention__layer_norm_rms_epsilon=1e-5,
    llama__vocab_size=40,
    tokenizer__ggml__bos_token_id=1,
) | {
    "tokenizer.ggml.tokens": ("arr[str]", [str(i) for i in range(40)]),
    "tokenizer.ggml.scores": ("arr[f32]", [0.0] * 40),
}


def llama(
    *, heads=4, kv_heads=2, head_dim=8, hidden=32, inner=48, layers=2, vocab=40, qk_norm=False,
    norms_after=False, tied=False,
):  # fmt: skip
    """The tensors of a Llama of these sizes, by GGUF's names, as float32."""
    q, k = heads * head_dim, kv_heads * head_dim
    shapes = {"token_embd": (vocab, hidden)}
    for i in range(layers):
        shapes |= {
            f"blk.{i}.attn_norm": (hidden,), f"blk.{i}.attn_q": (q, hidden),
            f"blk.{i}.attn_k": (k, hidden), f"blk.{i}.attn_v": (k, hidden),
            f"blk.{i}.attn_output": (hidden, q), f"blk.{i}.ffn_norm": (hidden,),
            f"blk.{i}.ffn_gate": (inner, hidden), f"blk.{i}.ffn_up": (inner, hidden),
            f"blk.{i}.ffn_down": (hidden, inner),
        }  # fmt: skip
        if qk_norm:
            shapes |= {f"blk.{i}.attn_{x}_norm": (head_dim,) for x in "qk"}
        if norms_after:
            shapes |= {f"blk.{i}.post_{x}_norm": (hidden,) for x in ("attention", "ffw")}
    shapes |= {"output_norm": (hidden,)} | ({} if tied else {"output": (vocab, hidden)})
    return {
        f"{name}.weight": np.arange(prod(shape), dtype=np.float32).reshape(shape)
        for name, shape in shapes.items()
    }


def write_model(file, metadata):
    """A tiny model with more metadata, of kind and value by key; None leaves a key out."""
    everything = MODEL | metadata
    kept = {key: value for key, value in everything.items() if value is not None}
    file.write_bytes(encode(kept, llama()).content)
    return file


def read_log(file):
    """Metadata of a published model, as logged: kind and value by key.

    Of arrays the log has the beginning alone; their value is their length and the numbers in it.
    Of split models the metadata is that of the whole.
    """
    metadata = {}
    for key, (kind, text) in json.loads(file.read_text(encoding="utf-8")).items():
        if key.startswith("split."):
            continue
        array = re.fullmatch(r"arr\[(\w+),(\d+)\]", kind)
        if array:
            numbers = [] if array[1] == "str" else re.findall(r"-?\d+(?:\.\d+)?", text)
            numbers = [float(n) if "." in n else int(n) for n in numbers]
            metadata[key] = f"arr[{array[1]}]", (int(array[2]), numbers)
        elif kind == "bool":
            metadata[key] = kind, text == "true"
        elif kind == "str":
            metadata[key] = kind, text
        else:
            metadata[key] = kind, float(text) if kind[0] == "f" else int(text)
    return metadata


# GPT-2's characters for bytes: what can be printed stands for itself.
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = [chr(i) for i in PRINTED] + [chr(256 + i) for i in range(256 - len(PRINTED))]
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def vocabulary(model, special):
    """A vocabulary of all bytes and a few words: its metadata, and `special` more at the end."""
    names = [f"<|special_{i}|>" for i in range(special)]
    if model == "gpt2":
        words = ["Ġt", "he", "Ġthe", "in"]
        tokens = [*BYTES, *words, *names]
        types = [NORMAL] * (len(BYTES) + len(words)) + [CONTROL] * special
        merges = ["Ġ t", "h e", "Ġt he", "i n"]
        return {
            "tokenizer.ggml.tokens": ("arr[str]", tokens),
            "tokenizer.ggml.token_type": ("arr[i32]", types),
            "tokenizer.ggml.merges": ("arr[str]", merges),
        }
    pieces = ["▁", "t", "h", "e", "i", "n", "▁t", "he", "▁the", "in"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces, *names]
    types = [
        UNKNOWN,
        CONTROL,
        CONTROL,
        *[BYTE] * 256,
        *[NORMAL] * len(pieces),
        *[CONTROL] * special,
    ]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [0.0] * special
    return {
        "tokenizer.ggml.tokens": ("arr[str]", tokens),
        "tokenizer.ggml.scores": ("arr[f32]", scores),
        "tokenizer.ggml.token_type": ("arr[i32]", types + [CONTROL] * special),
    }


def shrunk(log):
    """A tiny model with a log's metadata: the metadata and the tensors of its file.

    The sizes become small. Head sizes, the ratio of query to key heads, and every other key stay;
    so does the order of the special tokens, which come last in a small vocabulary.
    """
    architecture = log["general.architecture"][1]
    heads, hidden = (
        log[f"{architecture}.{key}"][1] for key in ("attention.head_count", "embedding_length")
    )
    kv_heads = log.get(f"{architecture}.attention.head_count_kv", ("u32", heads))[1]
    stated = log.get(f"{architecture}.attention.key_length")
    sizes = {
        "heads": heads // kv_heads,
        "kv_heads": 1,
        "head_dim": stated[1] if stated else hidden // heads,
        "inner": 64,
        "layers": 1,
    }
    sizes["hidden"] = 32 if stated else sizes["heads"] * sizes["head_dim"]
    special = [key for key, (kind, _) in log.items() if re.fullmatch(r"tokenizer\.\w+\..+_id", key)]
    known = sorted({log[key][1] for key in special} - {-1, 2**32 - 1})
    words = vocabulary(log["tokenizer.ggml.model"][1], len(known))
    sizes["vocab"] = len(words["tokenizer.ggml.tokens"][1])
    metadata = {}
    for key, (kind, value) in log.items():
        if kind.startswith("arr["):
            value = ["a"] * 2 if kind == "arr[str]" else value[1] or [0]
        metadata[key] = kind, value
    for key in special:
        if log[key][1] in known:
            metadata[key] = log[key][0], sizes["vocab"] - len(known) + known.index(log[key][1])
    metadata |= words
    changed = {
        "attention.head_count": sizes["heads"], "attention.head_count_kv": sizes["kv_heads"],
        "block_count": 1, "embedding_length": sizes["hidden"], "feed_forward_length": 64,
        "vocab_size": sizes["vocab"],
    }  # fmt: skip
    for key, value in changed.items():
        if (name := f"{architecture}.{key}") in log:
            metadata[name] = log[name][0], value
    gemma = architecture.startswith("gemma")
    tensors = llama(
        **sizes,
        qk_norm=architecture in ("qwen3", "gemma3"),
        norms_after=gemma and architecture != "gemma",
        tied=gemma,
    )
    return metadata, fused(tensors, log) if architecture == "phi3" else tensors


def fused(tensors, log):
    """A layer's tensors as files of Phi have them, with tables of divisors for a long context."""
    q, k, v, gate, up = (
        tensors.pop(f"blk.0.{name}.weight")
        for name in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
    )
    tensors["blk.0.attn_qkv.weight"] = np.concatenate([q, k, v])
    tensors["blk.0.ffn_up.weight"] = np.concatenate([gate, up])
    context, trained = (
        log.get(f"phi3.{key}", ("u32", 0))[1]
        for key in ("context_length", "rope.scaling.original_context_length")
    )
    if trained and trained < context:
        pairs = log["phi3.rope.dimension_count"][1] // 2
        for name in ("short", "long"):
            tensors[f"rope_factors_{name}.weight"] = np.ones(pairs, np.float32)
    return tensors

"""llama.cpp, as far as `record_llama_cpp` sees it.

What its functions take and give, in which order the graphs of models/llama.cpp and models/qwen2.cpp
are computed, what their tensors are called, and how they lie in memory. The real one runs in
peers/test_llama_cpp.py.
"""

from __future__ import annotations

import ctypes
import struct
import types

import numpy as np

GGML = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.int32): 26}
LAYOUT = struct.Struct("@iQ4q4Qi16ii10Q")  # type buffer ne nb op op_params flags src


class Tensor:
    """One in memory, with its sizes from the innermost on."""

    def __init__(self, name, array, source=None):
        self.name, self.array = name.encode(), np.ascontiguousarray(array)
        sizes = [*self.array.shape[::-1], 1, 1, 1][:4]
        strides = [self.array.itemsize * int(np.prod(sizes[:i])) for i in range(4)]
        sources = [0, 0 if source is None else source.address, *[0] * 8]
        kind = GGML[self.array.dtype]
        packed = LAYOUT.pack(kind, 0, *sizes, *strides, 0, *[0] * 16, 0, *sources)
        self.memory = ctypes.create_string_buffer(packed, len(packed))
        self.address = ctypes.addressof(self.memory)


class Function:
    """A function of a C library, which is told its types."""

    def __init__(self, body):
        self.body = body
        self.restype = self.argtypes = None

    def __call__(self, *arguments):
        assert self.argtypes is not None, "called before its types are known"
        return self.body(*arguments)


class Llama:
    """The modules llama_cpp and llama_cpp._ggml."""

    def __init__(self, graph, rope_type=0, status=0):
        self.graph, self.rope_type, self.status = graph, rope_type, status
        self.open, self.contexts, self.tensors = [], [], {}
        names = [name for name in dir(self) if name.startswith(("llama_", "ggml_backend_sched"))]
        self.module = types.ModuleType("llama_cpp")
        for name in names:
            setattr(self.module, name, getattr(self, name))
        self.ggml = types.ModuleType("llama_cpp._ggml")
        self.ggml.libggml = types.SimpleNamespace(
            ggml_get_name=Function(lambda t: self.tensors[t].name),
            ggml_nbytes=Function(lambda t: self.tensors[t].array.nbytes),
            ggml_backend_tensor_get=Function(self.copy),
        )

    def copy(self, address, target, offset, size):
        array = self.tensors[address].array
        assert (offset, size) == (0, array.nbytes)
        ctypes.memmove(target, array.ctypes.data, size)

    def ggml_backend_sched_eval_callback(self, function):
        return ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)(
            function
        )

    def llama_model_default_params(self):
        return types.SimpleNamespace()

    def llama_model_load_from_file(self, path, params):
        assert isinstance(path, bytes)
        self.open.append("model")
        return "model" if self.graph else None

    def llama_model_free(self, model):
        self.open.remove("model")

    def llama_model_rope_type(self, model):
        return self.rope_type

    def llama_context_default_params(self):
        return types.SimpleNamespace()

    def llama_init_from_model(self, model, params):
        self.open.append("context")
        self.contexts.append(params)
        return "context"

    def llama_free(self, context):
        self.open.remove("context")

    def llama_batch_init(self, count, embd, sequences):
        self.open.append("batch")
        rows = {name: [None] * count for name in ("token", "pos", "n_seq_id", "logits")}
        return types.SimpleNamespace(**rows, seq_id=[[None] * sequences for _ in range(count)])

    def llama_batch_free(self, batch):
        self.open.remove("batch")

    def llama_decode(self, context, batch):
        count = batch.n_tokens
        assert batch.pos == list(range(count))
        assert batch.n_seq_id == batch.logits == [1] * count
        assert batch.seq_id == [[0]] * count
        callback = self.contexts[-1].cb_eval
        for tensor in self.graph(batch.token):
            self.tensors[tensor.address] = tensor
            if callback(tensor.address, True, None) and not callback(tensor.address, False, None):
                return -3  # what is asked for and not wanted cancels the run
        return self.status

    def llama_print_system_info(self):
        return b"CPU : stand-in"


def graph_of(arrays, config, tokens, permuted):
    """The tensors of a run, without the axis of batches, in the order of models/llama.cpp."""
    count, width, heads = len(tokens), config.head_dim, config.num_attention_heads
    kv = config.num_key_value_heads
    row = int(tokens[0])  # which of the sequences this is

    def site(name):
        return arrays[name][row].astype(np.float32)

    def flat(name):
        array = site(name).reshape(count, -1)
        return interleaved_heads(array, width) if permuted else array

    yield Tensor("inp_tokens", np.asarray(tokens, np.int32))
    yield Tensor("embd", site("model.embed_tokens"))
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        yield Tensor(f"norm-{layer}", site(f"{prefix}.input_layernorm") + 1)
        yield Tensor(f"attn_norm-{layer}", site(f"{prefix}.input_layernorm"))
        for x, n in (("q", heads), ("k", kv)):
            product = flat(f"{prefix}.self_attn.{x}_proj")
            named = f"{x.upper()}cur-{layer}"
            if config.qkv_bias:
                yield Tensor(named, product + 1)
            yield Tensor(named, product)
            yield Tensor(named, product.reshape(count, n, width))
            yield Tensor(named, flat(f"{prefix}.self_attn.{x}_rope").reshape(count, n, width))
        if config.qkv_bias:
            yield Tensor(f"Vcur-{layer}", site(f"{prefix}.self_attn.v_proj") - 1)
        yield Tensor(f"Vcur-{layer}", site(f"{prefix}.self_attn.v_proj"))
        yield Tensor(f"Vcur-{layer}", site(f"{prefix}.self_attn.v_proj").reshape(count, kv, width))
        yield Tensor(f"kq-{layer}", np.ones((heads, count, 256), np.float32))
        yield Tensor(f"kq_soft_max-{layer}", np.ones((heads, count, 256), np.float32))
        attended = Tensor(
            f"kqv_out-{layer}", site(f"{prefix}.self_attn.attention").reshape(count, -1)
        )
        yield attended
        # models/qwen2.cpp gives the next no name.
        name = f"node_{layer}" if config.model_type == "qwen2" else f"attn_out-{layer}"
        yield Tensor(name, site(f"{prefix}.self_attn.o_proj"), attended)
        yield Tensor(f"ffn_inp-{layer}", site(f"{prefix}.attention_residual"))
        yield Tensor(f"ffn_norm-{layer}", site(f"{prefix}.post_attention_layernorm"))
        for x in ("up", "gate"):
            product = site(f"{prefix}.mlp.{x}_proj")
            yield Tensor(f"ffn_{x}-{layer}", product + 1 if config.mlp_bias else product)
            if config.mlp_bias:
                yield Tensor(f"ffn_{x}_b-{layer}", product)
        yield Tensor(f"ffn_swiglu-{layer}", site(f"{prefix}.mlp.act"))
        if config.mlp_bias:
            yield Tensor(f"ffn_down-{layer}", site(f"{prefix}.mlp.down_proj") + 1)
        yield Tensor(f"ffn_out-{layer}", site(f"{prefix}.mlp.down_proj"))
        yield Tensor(f"l_out-{layer}", site(prefix))
    yield Tensor("norm", site("model.norm") + 1)
    yield Tensor("result_norm", site("model.norm"))
    yield Tensor("result_output", site("lm_head"))


def interleaved_heads(array, width):
    halves = [array[..., i : i + width] for i in range(0, array.shape[-1], width)]
    pairs = [np.stack([h[..., : width // 2], h[..., width // 2 :]], axis=-1) for h in halves]
    return np.concatenate([p.reshape(h.shape) for p, h in zip(pairs, halves, strict=True)], -1)

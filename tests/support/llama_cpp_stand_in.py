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
    """One in memory, with its sizes from the innermost on, and what it was computed from."""

    def __init__(self, name, array, *sources):
        self.name, self.array = name.encode(), np.ascontiguousarray(array)
        sizes = [*self.array.shape[::-1], 1, 1, 1][:4]
        strides = [self.array.itemsize * int(np.prod(sizes[:i])) for i in range(4)]
        self.sources = sources
        places = [source.address for source in sources] + [0] * (10 - len(sources))
        kind = GGML[self.array.dtype]
        packed = LAYOUT.pack(kind, 0, *sizes, *strides, 0, *[0] * 16, 0, *places)
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

    def know(self, tensor):
        self.tensors[tensor.address] = tensor
        for source in tensor.sources:
            self.know(source)

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
            self.know(tensor)
            if callback(tensor.address, True, None) and not callback(tensor.address, False, None):
                return -3  # what is asked for and not wanted cancels the run
        return self.status

    def llama_print_system_info(self):
        return b"CPU : stand-in"


def weight(name):
    """A weight, of which the recorder sees the name alone."""
    return Tensor(name, np.zeros(1, np.float32))


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

    def product(name, module, array, x, bias=False):
        """A product, before which comes that without the bias."""
        matrix = weight(f"{module}.weight")
        if not bias:
            return [Tensor(name, array, matrix, x)]
        plain = Tensor(name, array + 1, matrix, x)
        return [plain, Tensor(name, array, plain, weight(f"{module}.bias"))]

    def norm(name, module, array, x):
        plain = Tensor(name.replace("attn_", "").replace("ffn_", ""), array + 1, x)
        return [plain, Tensor(name, array, plain, weight(f"{module}.weight"))]

    places = Tensor("inp_pos", np.arange(count, dtype=np.int32))
    yield Tensor("inp_tokens", np.asarray(tokens, np.int32))
    x = Tensor("embd", site("model.embed_tokens"), weight("token_embd.weight"))
    yield x
    for layer in range(config.num_hidden_layers):
        prefix, own = f"model.layers.{layer}", f"blk.{layer}"
        normed = norm(
            f"attn_norm-{layer}", f"{own}.attn_norm", site(f"{prefix}.input_layernorm"), x
        )
        yield from normed
        for q, n in (("q", heads), ("k", kv), ("v", kv)):
            named = f"{q.upper()}cur-{layer}"
            array = flat(f"{prefix}.self_attn.{q}_proj")
            if q == "v":
                array = site(f"{prefix}.self_attn.v_proj").reshape(count, -1)
            yield from product(named, f"{own}.attn_{q}", array, normed[-1], config.qkv_bias)
            reshaped = Tensor(named, array.reshape(count, n, width))
            yield reshaped
            if q != "v":
                rotated = flat(f"{prefix}.self_attn.{q}_rope").reshape(count, n, width)
                yield Tensor(named, rotated, reshaped, places)
        yield Tensor(f"kq-{layer}", np.ones((heads, count, 256), np.float32))
        yield Tensor(f"kq_soft_max-{layer}", np.ones((heads, count, 256), np.float32))
        attended = Tensor(
            f"kqv_out-{layer}", site(f"{prefix}.self_attn.attention").reshape(count, -1)
        )
        yield attended
        # models/qwen2.cpp gives the next no name.
        name = f"node_{layer}" if config.model_type == "qwen2" else f"attn_out-{layer}"
        array = site(f"{prefix}.self_attn.o_proj")
        yield from product(name, f"{own}.attn_output", array, attended, config.o_bias)
        # models/phi3.cpp gives the next no name.
        x = Tensor(f"ffn_inp-{layer}" if layer else "node_9", site(f"{prefix}.attention_residual"))
        yield x
        array = site(f"{prefix}.post_attention_layernorm")
        normed = norm(f"ffn_norm-{layer}", f"{own}.ffn_norm", array, x)
        yield from normed
        for y in ("up", "gate"):
            array = site(f"{prefix}.mlp.{y}_proj")
            yield from product(
                f"ffn_{y}-{layer}", f"{own}.ffn_{y}", array, normed[-1], config.mlp_bias
            )
        act = Tensor(f"ffn_swiglu-{layer}", site(f"{prefix}.mlp.act"))
        yield act
        array = site(f"{prefix}.mlp.down_proj")
        yield from product(f"ffn_out-{layer}", f"{own}.ffn_down", array, act, config.mlp_bias)
        x = Tensor(f"l_out-{layer}", site(prefix))
        yield x
    normed = norm("result_norm", "output_norm", site("model.norm"), x)
    yield from normed
    yield from product("result_output", "output", site("lm_head"), normed[-1])


def interleaved_heads(array, width):
    halves = [array[..., i : i + width] for i in range(0, array.shape[-1], width)]
    pairs = [np.stack([h[..., : width // 2], h[..., width // 2 :]], axis=-1) for h in halves]
    return np.concatenate([p.reshape(h.shape) for p, h in zip(pairs, halves, strict=True)], -1)

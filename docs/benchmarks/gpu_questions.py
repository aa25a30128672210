"""What the design for GPUs takes for granted, asked of one: each function is a part of gpu.py."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from gpu_sizes import Sizes

from llama_layers import KVCache, forward, generate
from llama_layers.backends.cupy import cublas, launch
from llama_layers.backends.cupy.detect import KERNEL
from llama_layers.backends.cupy.upload import Part, Source, upload
from llama_layers.bench.gpu import Gpu
from llama_layers.bench.models import RandomWeights

DTYPE = "bfloat16"


def cupy() -> Any:
    return importlib.import_module("cupy")


def bits(array: Any) -> np.ndarray:
    """The bytes of an array, on the CPU."""
    return array.get().view(np.uint8)


def matrices(*shapes: tuple[int, int]) -> Iterator[Any]:
    numbers = RandomWeights(DTYPE, "cupy")
    return (numbers.matrix(*shape) for shape in shapes)


def said(call: Callable[[], Any]) -> str:
    """What an error says, or that there was none."""
    try:
        call()
    except Exception as error:  # whatever it is, it is what we ask for
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return "works"


def captured_gemm(sizes: Sizes) -> dict[str, Any]:
    """Is a product of cuBLAS, captured and replayed, the eager one bit for bit?"""
    width = sizes.large.hidden_size
    x, weight = matrices((sizes.rows, width), (width, width))
    out = cupy().empty((sizes.rows, width), dtype=x.dtype)
    cupy().cuda.Device().synchronize()
    with cupy().cuda.Stream(non_blocking=True) as stream:
        cublas.matmul(x, weight.T, out)
        eager = bits(out)
        stream.begin_capture()
        cublas.matmul(x, weight.T, out)
        graph = stream.end_capture()
        differ = 0
        for _ in range(sizes.replays):
            out.view(np.uint16)[...] = 0
            graph.launch(stream)
            differ += not np.array_equal(bits(out), eager)
    return {"replays": sizes.replays, "replays that differ": differ}


def matmul_of_cupy(sizes: Sizes) -> dict[str, Any]:
    """Is CuPy's own 2-D product as fast as ours, without a copy, and its 3-D one a trap?"""
    width = sizes.large.hidden_size
    x, weight = matrices((sizes.rows, width), (width, width))
    out = cupy().empty((sizes.rows, width), dtype=x.dtype)
    gpu, flops = Gpu("qkv", DTYPE), 2 * sizes.rows * width**2
    pool = cupy().get_default_memory_pool()
    calls = {
        "ours": lambda: cublas.matmul(x, weight.T, out),
        "2-D": lambda: x @ weight.T,
        "2-D, float16": lambda: halves[0] @ halves[1].T,
        "3-D, float16": lambda: halves[0][None] @ halves[1].T,
    }
    halves = [cupy().asarray(a.get().astype(np.float16)) for a in (x, weight)]
    found: dict[str, Any] = {"3-D, bfloat16": said(lambda: x[None] @ weight.T)}
    for name, call in calls.items():
        pool.free_all_blocks()
        before = pool.total_bytes()
        if (problem := said(call)) != "works":
            found[name] = problem
            continue
        taken = pool.total_bytes() - before
        seconds = min(gpu.timed_by_events(call) for _ in range(5))
        found[name] = {"TFLOP/s": flops / seconds / 1e12, "MB taken": taken / 1e6}
    return found


def few_rows(sizes: Sizes) -> dict[str, Any]:
    """How much of the copy bandwidth do our kernel and cuBLAS reach for one to eight rows?"""
    inputs, outputs = sizes.large.hidden_size, 3 * sizes.large.hidden_size
    weights = list(matrices(*[(outputs, inputs)] * sizes.copies))
    gpu = Gpu("qkv", DTYPE)
    gpu.probe()
    copied = gpu.reading.best
    found: dict[str, Any] = {"copy, GB/s": copied / 1e9}
    for rows in (1, 2, 4, 8):
        (x,) = matrices((rows, inputs))
        out = cupy().empty((rows, outputs), dtype=x.dtype)

        def kernel(x: Any = x, out: Any = out) -> None:
            for weight in weights:
                launch.gemv(x, weight, out)

        def library(x: Any = x, out: Any = out) -> None:
            for weight in weights:
                cublas.matmul(x, weight.T, out)

        for name, call in (("kernel", kernel), ("cuBLAS", library)):
            call()
            seconds = sorted(gpu.timed_by_events(call) for _ in range(9))[4]
            rate = sum(w.nbytes for w in weights) / seconds
            found[f"{name}, {rows} rows, share of the copy"] = rate / copied
    return found


def launches(sizes: Sizes) -> dict[str, Any]:
    """How long do a launch by Python, a graph's launch, and a kernel inside a graph take?"""
    kernel = cupy().RawModule(code=KERNEL).get_function("nothing")
    count = sizes.replays
    with cupy().cuda.Stream(non_blocking=True) as stream:
        kernel((1,), (32,), ())
        seconds = {
            "launch, us": timed(stream, lambda: [kernel((1,), (32,), ()) for _ in range(count)])
        }
        stream.begin_capture()
        for _ in range(count):
            kernel((1,), (32,), ())
        long = stream.end_capture()
        stream.begin_capture()
        kernel((1,), (32,), ())
        short = stream.end_capture()
        for graph in (long, short):
            graph.launch(stream)
        seconds["kernel in a graph, us"] = timed(stream, lambda: long.launch(stream))
        seconds["graph of one kernel, us"] = timed(
            stream, lambda: [short.launch(stream) for _ in range(count)]
        )
    return {name: 1e6 * s / count for name, s in seconds.items()}


def timed(stream: Any, call: Callable[[], Any]) -> float:
    stream.synchronize()
    start = time.perf_counter()
    call()
    stream.synchronize()
    return time.perf_counter() - start


def bfloat16(sizes: Sizes) -> dict[str, Any]:
    """Does CuPy compile elementwise kernels of bfloat16 here, and are they right?"""
    (a,) = matrices((3, 5))
    exact = a.get().astype(np.float32)

    def check(call: Callable[[], Any], expected: np.ndarray) -> str:
        return said(lambda: np.testing.assert_allclose(call().get(), expected, rtol=2**-8))

    return {
        "add": check(lambda: a + a, 2 * exact),
        "to float32": check(lambda: a.astype(np.float32), exact),
        "exp": said(lambda: cupy().exp(a).get()),
    }


def repeatability(sizes: Sizes) -> dict[str, Any]:
    """Same bits again, on two streams at once, and for a row whatever is beside it?"""
    width = sizes.large.hidden_size
    x, weight = matrices((sizes.rows, width), (width, width))

    def product(of: Any) -> Any:
        out = cupy().empty((of.shape[0], width), dtype=of.dtype)
        cublas.matmul(of, weight.T, out)
        return out

    def few(of: Any) -> Any:
        out = cupy().empty((of.shape[0], width), dtype=of.dtype)
        launch.gemv(of, weight, out)
        return out

    first = bits(product(x))
    again = sum(not np.array_equal(bits(product(x)), first) for _ in range(sizes.repeats))
    cupy().cuda.Device().synchronize()
    streams = [cupy().cuda.Stream(non_blocking=True) for _ in range(2)]
    at_once = 0
    for _ in range(sizes.repeats):
        outs = []
        for stream in streams:
            with stream:
                outs.append(product(x))
        for stream, out in zip(streams, outs, strict=True):
            with stream:
                at_once += not np.array_equal(bits(out), first)
    own = said(lambda: x @ weight.T)
    if own == "works":
        start = bits(x @ weight.T)
        own = str(sum(not np.array_equal(bits(x @ weight.T), start) for _ in range(sizes.repeats)))
    counts = sorted({n for n in (9, 16, 64, 128, 512, 2048) if n < sizes.rows} | {sizes.rows})
    rows = {n: bits(product(x[:n])[:1]) for n in counts}
    kernel = {n: bits(few(x[:n])[:1]) for n in range(1, 9)}
    return {
        "repeats": sizes.repeats,
        "that differ": again,
        "that differ on two streams at once": at_once,
        "that differ by CuPy's handle, which has no workspace of ours": own,
        "rows of x whose first result is that of the most": [
            n for n in counts if np.array_equal(rows[n], rows[counts[-1]])
        ],
        "of": counts,
        "same of the kernel": [n for n in kernel if np.array_equal(kernel[n], kernel[1])],
    }


def fused_attention(sizes: Sizes) -> dict[str, Any]:
    """Does cuDNN's attention take CuPy's bfloat16 with grouped heads, without torch?"""
    try:
        cudnn: Any = importlib.import_module("cudnn")
    except ImportError:
        return {"cudnn-frontend": "not installed"}
    heads, kv_heads, count, width = 32, 8, sizes.rows, 128
    types = cudnn.data_type
    graph = cudnn.pygraph(
        io_data_type=types.BFLOAT16,
        intermediate_data_type=types.FLOAT,
        compute_data_type=types.FLOAT,
    )
    arrays, tensors = [], []
    for name, number in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        (flat,) = matrices((count, number * width))
        arrays.append(flat)
        stride = [count * number * width, width, number * width, 1]
        dim = [1, number, count, width]
        tensors.append(graph.tensor(name=name, dim=dim, stride=stride, data_type=types.BFLOAT16))
    out = cupy().empty((count, heads * width), dtype=arrays[0].dtype)
    result, _ = graph.sdpa(
        *(), q=tensors[0], k=tensors[1], v=tensors[2], is_inference=True,
        attn_scale=1 / math.sqrt(width), use_causal_mask=True, name="sdpa",
    )  # fmt: skip
    result.set_output(True).set_dim([1, heads, count, width])
    result.set_stride([count * heads * width, width, heads * width, 1])
    graph.build([cudnn.heur_mode.A])
    workspace = cupy().empty((max(1, graph.get_workspace_size()),), dtype=np.uint8)
    given = {t: a.data.ptr for t, a in zip([*tensors, result], [*arrays, out], strict=True)}

    def call() -> None:
        graph.execute(given, workspace.data.ptr)

    call()
    seconds = min(Gpu("qkv", DTYPE).timed_by_events(call) for _ in range(5))
    flops = 4 * heads * width * count**2 / 2
    return {"cudnn-frontend": cudnn.__version__, "TFLOP/s": flops / seconds / 1e12}


def uploads(sizes: Sizes) -> dict[str, Any]:
    """How fast do weights come from main memory, through pinned buffers?"""
    block = np.random.default_rng(0).integers(0, 255, 1000, np.uint8)
    held = np.resize(block, sizes.uploaded)
    pieces = [held[i : i + sizes.part] for i in range(0, held.size, sizes.part)]
    parts = [Part(piece.nbytes, partial(np.asarray, piece)) for piece in pieces]
    source = Source(held.shape, held.dtype, parts)
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        arrays = upload({"all": source}, cupy().cuda.Device(), lambda key, nbytes: None)
        cupy().cuda.Device().synchronize()
        rates.append(held.nbytes / (time.perf_counter() - start) / 1e9)
        right = np.array_equal(arrays["all"][-sizes.part :].get(), pieces[-1])
        del arrays
    return {"GB/s": rates, "right": bool(right)}


def replays(sizes: Sizes) -> dict[str, Any]:
    """Are the logits of a token the same in each replay, bit for bit?"""
    model = RandomWeights(DTYPE, "cupy").model(sizes.small)
    ids = cupy().asarray(np.arange(1, 10, dtype=np.int64)[None])
    cache = forward(model, ids[:, :8], cache=KVCache.create(model, 1, 16)).cache
    first = bits(forward(model, ids[:, 8:], cache=cache).logits)
    differ = sum(
        not np.array_equal(bits(forward(model, ids[:, 8:], cache=cache).logits), first)
        for _ in range(sizes.replays)
    )
    return {"replays": sizes.replays, "replays that differ": differ}


def endurance(sizes: Sizes) -> dict[str, Any]:
    """Does the device's memory stay as it is while tokens are drawn?"""
    model = RandomWeights(DTYPE, "cupy").model(sizes.small)
    runtime = cupy().cuda.runtime
    ids = cupy().asarray(np.ones((1, 4), np.int64))
    steps = generate(model, ids, max_new_tokens=sizes.endurance, eos_token_id=())
    for _ in range(sizes.endurance // 10):
        next(steps)
    before, start = runtime.memGetInfo()[0], time.perf_counter()
    rest = sum(1 for _ in steps)
    seconds = time.perf_counter() - start
    return {
        "tokens": sizes.endurance,
        "bytes taken after the first tenth": before - runtime.memGetInfo()[0],
        "tokens/s": rest / seconds,
    }


QUESTIONS = {
    f.__name__: f
    for f in (
        captured_gemm, matmul_of_cupy, few_rows, launches, bfloat16, repeatability,
        fused_attention, uploads, replays, endurance,
    )
}  # fmt: skip

"""Bugs to plant in the captured steps of decoding, and in the generation on a device."""

from __future__ import annotations

from catalogue import Mutant

DECODE = "backends/cupy/decode.py"
GENERATION = "backends/cupy/generation.py"
COMPILE = "backends/cupy/compile.py"
STEPS = "gpu/test_decode.py"
DRAWN = "gpu/test_drawn_tokens.py"

MUTANTS = [
    Mutant(
        "a graph given the keys for the values",
        DECODE,
        "keys, values = arrays[index], arrays[count + index]",
        "values, keys = arrays[index], arrays[count + index]",
        f"{STEPS}::test_random_models[stand-in-gqa-float32]",
    ),
    Mutant(
        "a graph without windows",
        DECODE,
        "window=self.config.window_of(index), keep=keep,",
        "window=None, keep=keep,",
        f"{STEPS}::test_random_models[stand-in-some windows-float32]",
    ),
    Mutant(
        "a graph that sees padding",
        DECODE,
        "window=self.config.window_of(index), keep=keep,",
        "window=self.config.window_of(index), keep=None,",
        f"{STEPS}::test_a_ring[stand-in-True]",
    ),
    Mutant(
        "a graph with one norm for both",
        DECODE,
        "launch.norm(self.x, layer.post_attention_layernorm, self.normed, eps)",
        "launch.norm(self.x, layer.input_layernorm, self.normed, eps)",
        f"{STEPS}::test_random_models[stand-in-gqa-bfloat16]",
    ),
    Mutant(
        "a graph without the bias of queries, keys and values",
        DECODE,
        "self.qkv, bias=attention.qkv.bias)",
        "self.qkv)",
        f"{STEPS}::test_random_models[stand-in-qwen2-float32]",
    ),
    Mutant(
        "a graph without the bias of the output of attention",
        DECODE,
        "bias=attention.o_bias, ",
        "",
        f"{STEPS}::test_random_models[stand-in-biases-float32]",
    ),
    Mutant(
        "a graph without the biases of gate and up",
        DECODE,
        "gate_bias=mlp.gate_bias, up_bias=mlp.up_bias,",
        "",
        f"{STEPS}::test_random_models[stand-in-biases-float32]",
    ),
    Mutant(
        "a graph whose MLP replaces the residual stream",
        DECODE,
        "bias=mlp.down_bias, residual=self.x)",
        "bias=mlp.down_bias)",
        f"{STEPS}::test_random_models[stand-in-gqa-float32]",
    ),
    Mutant(
        "the token counted among those before it",
        DECODE,
        "int(cache.length) - 1",
        "int(cache.length)",
        f"{STEPS}::test_random_models[stand-in-gqa-float32]",
    ),
    Mutant(
        "the length left as it was captured",
        DECODE,
        "        self.length.fill(length)\n        self.replay()",
        "        self.replay()",
        f"{STEPS}::test_random_models[stand-in-gqa-float32]",
    ),
    Mutant(
        "the turns left as they were captured",
        DECODE,
        "            own[...] = given.reshape(-1, own.shape[1])\n",
        "            if self.replay._graph is None:\n"
        "                own[...] = given.reshape(-1, own.shape[1])\n",
        f"{STEPS}::test_random_models[stand-in-gqa-float32]",
    ),
    Mutant(
        "one row's turns for each",
        DECODE,
        "given.reshape(-1, own.shape[1])",
        "given.reshape(-1, own.shape[1])[:1]",
        f"{STEPS}::test_given_positions_count",
    ),
    Mutant(
        "the graph of another cache replayed",
        DECODE,
        "all(known() is array for",
        "all(known() is not None for",
        f"{STEPS}::test_several_caches_take_turns",
    ),
    Mutant(
        "the graph of exchanged layers replayed",
        DECODE,
        "all(a is b for a, b in",
        "all(True for a, b in",
        f"{STEPS}::test_layers_exchanged_under_a_cache",
    ),
    Mutant(
        "each token captured anew",
        DECODE,
        "        self._launches = None  # whose",
        "        self._graph = None  # whose",
        f"{STEPS}::test_replays_give_the_same_bits[stand-in-float32]",
    ),
    Mutant(
        "graphs of caches that are gone kept",
        DECODE,
        "[step for step in known if all(array() is not None for array in step.cache)]",
        "list(known)",
        f"{STEPS}::test_graphs_go_with_their_caches_and_models",
    ),
    Mutant(
        "graphs that outlive their models",
        DECODE,
        "_STEPS: WeakKeyDictionary[LlamaWeights, list[Step]] = WeakKeyDictionary()",
        "_STEPS: dict[LlamaWeights, list[Step]] = {}",
        f"{STEPS}::test_graphs_go_with_their_caches_and_models",
    ),
    Mutant(
        "the memory of the step given away",
        DECODE,
        "return self.x.reshape(x.shape).copy()",
        "return self.x.reshape(x.shape)",
        f"{STEPS}::test_a_token_allocates_and_captures_nothing_of_its_own",
    ),
    Mutant(
        "a norm of another dtype misread",
        DECODE,
        "return len(kinds) == 1 and",
        "return len(kinds) >= 1 and",
        f"{STEPS}::test_what_no_graph_is_made_for",
    ),
    Mutant(
        "more sequences than the kernels take",
        DECODE,
        "not 0 < cache.keys[0].shape[0] <= MOST\n",
        "not 0 < cache.keys[0].shape[0] <= MOST + 1\n",
        f"{STEPS}::test_what_no_graph_is_made_for",
    ),
    Mutant(
        "a tap that a graph does not call",
        DECODE,
        "tap is not untouched or ",
        "",
        f"{STEPS}::test_what_no_graph_is_made_for",
    ),
    Mutant(
        "the next step asked for when this one has been read",
        GENERATION,
        """\
            ahead = step.start() if left else tokens
            tokens.event.synchronize()
""",
        """\
            tokens.event.synchronize()
            ahead = step.start() if left else tokens
""",
        f"{DRAWN}::test_the_device_is_one_token_ahead",
    ),
    Mutant(
        "one place in main memory for the tokens of two steps",
        GENERATION,
        "self.host[self.started % 2]",
        "self.host[0]",
        f"{DRAWN}::test_sequences_end_as_by_the_definition[stand-in-True]",
    ),
    Mutant(
        "tokens read before they have come",
        GENERATION,
        """\
            tokens.event.synchronize()
            if (""",
        """\
            if (""",
        f"{DRAWN}::test_tokens_in_main_memory_are_those_on_the_device",
    ),
    Mutant(
        "tokens of the next step given for those of this one",
        GENERATION,
        "ids = self.ids.astype(cupy.int64)",
        "ids = self.ids",
        f"{DRAWN}::test_sequences_end_as_by_the_definition[stand-in-True]",
    ),
    Mutant(
        "the generator advanced beforehand",
        GENERATION,
        "copy.deepcopy(rng).random",
        "rng.random",
        f"{DRAWN}::test_the_generator_is_left_as_the_definition_leaves_it",
    ),
    Mutant(
        "the generator not advanced",
        GENERATION,
        "            if temperature != 0:\n                rng.random(ids.shape)\n",
        "",
        f"{DRAWN}::test_the_generator_is_left_as_the_definition_leaves_it",
    ),
    Mutant(
        "padding counted in positions of a graph",
        GENERATION,
        "first = to_numpy(cache.counts)",
        "first = np.full(sequences, cache.length)",
        f"{DRAWN}::test_the_definition_s_tokens[stand-in-gqa-{{}}-padded]",
    ),
    Mutant(
        "every sequence turned as the shortest",
        GENERATION,
        "(first - first.min()).astype(np.int32)",
        "np.zeros(sequences, np.int32)",
        f"{DRAWN}::test_the_definition_s_tokens[stand-in-gqa-{{}}-padded]",
    ),
    Mutant(
        "tokens to come taken for padding",
        GENERATION,
        "            cache.keep[:, cache.length :] = True",
        "            pass",
        f"{DRAWN}::test_padding_of_a_branch_that_was_left",
    ),
    Mutant(
        "a table for one length used for all",
        GENERATION,
        'scaling.rope_type == "dynamic"',
        "False",
        f"{DRAWN}::test_the_definition_s_tokens[stand-in-dynamic-{{}}-whole]",
    ),
    Mutant(
        "padding in a ring forgotten too late",
        GENERATION,
        "if cache.keep is not None and cache.window is not None:",
        "if False:",
        f"{DRAWN}::test_the_definition_s_tokens[stand-in-window-{{}}-padded]",
    ),
    Mutant(
        "filters forgotten on a device",
        GENERATION,
        'for name in ("top_k", "top_p", "min_p")',
        'for name in ("top_k", "top_p")',
        f"{DRAWN}::test_what_is_drawn_by_the_definition",
    ),
    Mutant(
        "tokens of NaN given",
        GENERATION,
        "if (tokens.host < 0).any():",
        "if False:",
        f"{DRAWN}::test_nan_is_refused[stand-in-{{}}]",
    ),
    Mutant(
        "memory freed under a step that runs",
        GENERATION,
        "        step.stream.synchronize()  # before the memory of a step that still runs goes\n",
        "        pass\n",
        f"{DRAWN}::test_a_generation_that_is_left_takes_its_memory_along",
    ),
    Mutant(
        "the step that is ahead not waited for",
        GENERATION,
        "        step.stream.synchronize()  # before",
        "        tokens.event.synchronize()  # before",
        f"{DRAWN}::test_a_generation_that_is_left_takes_its_memory_along",
    ),
    Mutant(
        "a strided array handed to a kernel",
        COMPILE,
        "if not value.flags.c_contiguous:",
        "if False:",
        "gpu/test_stand_in.py::test_a_kernel_gets_what_it_reads",
    ),
    Mutant(
        "one kernel for all macros",
        COMPILE,
        "tuple(sorted(macros.items())), shared)",
        "tuple(sorted(macros.items()))[:1], shared)",
        f"{STEPS}::test_random_models[stand-in-gqa-bfloat16]",
    ),
]

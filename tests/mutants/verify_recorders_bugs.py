"""Bugs of what takes other engines' arrays: names, shapes, files and recorders."""

from __future__ import annotations

from catalogue import Mutant

_NAMES = "verify/test_aliases.py::TestNames"
_SHAPES = "verify/test_aliases.py::TestShapes"
_FILES = "verify/test_recorders.py::TestReadArrays"
_LLAMA_CPP = "verify/test_record_llama_cpp.py"
_PEER = "peers/test_recorders.py"

NAMES = [
    Mutant(
        "tensors before and after RoPE swapped",
        "verify/aliases.py",
        "yield site.format(number), names[place]",
        "yield site.format(number), names[-1 - place if len(meanings) == 2 else place]",
        f"{_NAMES}::test_of_several_tensors",
    ),
    Mutant(
        "tensors in the order of their numbers' digits",
        "verify/aliases.py",
        "[name for _, name in sorted(found)]",
        "sorted(name for _, name in found)",
        f"{_NAMES}::test_of_several_tensors",
    ),
    Mutant(
        "the stream before attention taken for that after it",
        "verify/aliases.py",
        "ffn_inp-{}                     blocks.{}.hook_resid_mid",
        "ffn_inp-{}                     blocks.{}.hook_resid_pre",
        f"{_NAMES}::test_become_those_of_sites[names2]",
    ),
    Mutant(
        "the last of two arrays of one site taken",
        "verify/aliases.py",
        "        if site in given:",
        "        if site in given and name == site:",
        f"{_NAMES}::test_refused",
    ),
    Mutant(
        "a lone Qcur taken for queries",
        "verify/aliases.py",
        "    if len(meanings) > len(names):\n",
        "    meanings = meanings[-len(names) :]\n    if not names:\n",
        f"{_NAMES}::test_refused",
    ),
    Mutant(
        "llama.cpp's norm taken for Meta's",
        "verify/aliases.py",
        'if plain == "norm" and is_llama_cpp:',
        'if plain == "norm" and is_llama_cpp and is_meta:',
        f"{_NAMES}::test_norm_of_llama_cpp_is_no_site",
    ),
    Mutant(
        "arrays read to be renamed",
        "verify/aliases.py",
        "return _Renamed(arrays, given)",
        "return {site: arrays[name] for site, name in given.items()}",
        f"{_NAMES}::test_no_array_is_read",
    ),
]

SHAPES = [
    Mutant(
        "interleaved pairs left as they are",
        "verify/fit.py",
        "return in_halves(array, self._width) if turned else array",
        "return array",
        f"{_SHAPES}::test_interleaved[gqa]",
    ),
    Mutant(
        "pairs interleaved once more",
        "verify/fit.py",
        "array.reshape(*array.shape[:2], -1, width // 2, 2)",
        "array.reshape(*array.shape[:2], -1, 2, width // 2)",
        f"{_SHAPES}::test_interleaved[llama3]",
    ),
    Mutant(
        "values deinterleaved too",
        "verify/fit.py",
        'TURNED = ("self_attn.q_proj", "self_attn.k_proj",',
        'TURNED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",',
        f"{_SHAPES}::test_interleaved[gqa]",
    ),
    Mutant(
        "any array of the right size taken",
        "verify/fit.py",
        "if found in _spellings(site, shape, self._width):",
        "if np.prod(found) == np.prod(shape):",
        f"{_SHAPES}::test_refused",
    ),
]

FILES = [
    Mutant(
        "bits of bfloat16 taken for float16",
        "verify/recorders/array_files.py",
        ".view(ml_dtypes.bfloat16)",
        ".view(np.float16)",
        f"{_FILES}::test_bfloat16",
    ),
    Mutant(
        "files read when they are listed",
        "verify/recorders/array_files.py",
        "_Lazy(stored), **tokens",
        "{name: array.read() for name, array in stored.items()}, **tokens",
        f"{_FILES}::test_arrays_are_mapped",
    ),
    Mutant(
        "the second of two arrays of one name taken",
        "verify/recorders/array_files.py",
        "            if name in stored:",
        "            if name not in stored and False:",
        "verify/test_recorders.py::TestRefusedFiles::test_one_name_twice",
    ),
]

LLAMA_CPP = [
    Mutant(
        "layouts of RoPE swapped",
        "verify/recorders/llama_cpp.py",
        '{0: "interleaved", 2: "half"}',
        '{2: "interleaved", 0: "half"}',
        f"{_LLAMA_CPP}::test_sites",
    ),
    Mutant(
        "products without their biases",
        "verify/recorders/llama_cpp.py",
        'if n.partition("#")[0] != plain}',
        'if n.partition("#")[0] != plain.replace("-", "_b-")}',
        f"{_LLAMA_CPP}::test_sites",
    ),
    Mutant(
        "an unknown structure trusted",
        "verify/recorders/llama_cpp.py",
        "if reach + dtype.itemsize != size:",
        "if reach + dtype.itemsize < 0:",
        f"{_LLAMA_CPP}::test_refused_structures",
    ),
    Mutant(
        "a context left open",
        "verify/recorders/llama_cpp.py",
        "        api.llama_free(context)",
        "        pass",
        f"{_LLAMA_CPP}::test_sites",
    ),
]

TRANSFORMERS = [
    Mutant(
        "heads before tokens",
        "verify/recorders/hugging_face.py",
        'keep(f"{name}.k_rope", key.transpose(1, 2))',
        'keep(f"{name}.k_rope", key)',
        f"{_PEER}::test_every_site",
    ),
    Mutant(
        "another module's input",
        "verify/recorders/hugging_face.py",
        '"mlp.down_proj": "mlp.act"',
        '"mlp.up_proj": "mlp.act"',
        f"{_PEER}::test_every_site",
    ),
    Mutant(
        "dropout left on",
        "verify/recorders/hugging_face.py",
        "        model.eval()\n",
        "",
        f"{_PEER}::TestModelIsLeftAsItWas::test_after_a_run",
    ),
    Mutant(
        "every module set to training afterwards",
        "verify/recorders/hugging_face.py",
        "            module.training = True",
        "            model.train()",
        f"{_PEER}::TestModelIsLeftAsItWas::test_after_a_run",
    ),
    Mutant(
        "hooks left behind",
        "verify/recorders/hugging_face.py",
        "stack.callback(module.register_forward_hook(hook).remove)",
        "module.register_forward_hook(hook)",
        f"{_PEER}::TestModelIsLeftAsItWas::test_after_a_run",
    ),
    Mutant(
        "another model recorded",
        "verify/recorders/hugging_face.py",
        "names.get(id(module))",
        'f"model.layers.{module.layer_idx}.self_attn"',
        f"{_PEER}::TestModelIsLeftAsItWas::test_beside_another_model",
    ),
    Mutant(
        "a jump of the positions begins another text",
        "verify/recorders/hugging_face.py",
        'options.setdefault("attention_mask", torch.ones_like(ids))',
        'options.setdefault("attention_mask", None)',
        f"{_PEER}::TestTrace::test_positions",
    ),
    Mutant(
        "positions counted, whatever was given",
        "verify/recorders/hugging_face.py",
        "position_ids = to_numpy(places[0])",
        "position_ids = np.arange(ids.shape[1])[None]",
        f"{_PEER}::TestTrace::test_positions",
    ),
]

REFUSALS = [
    Mutant(
        "heads before tokens refused without a word of it",
        "verify/fit.py",
        "shape[-3:] == (heads, count, self._width)",
        "shape[-3:] == (count, heads, self._width)",
        "verify/test_check.py::TestRefused::test_heads_before_tokens",
    ),
    Mutant(
        "tokens counted along heads that come first",
        "verify/validate.py",
        "return batch, heads, tokens, width",
        "return batch, tokens, heads, width",
        "verify/test_check.py::TestRefused::test_heads_before_tokens",
    ),
    Mutant(
        "a dtype that no array can show passed over",
        "verify/check.py",
        "if FLOATS[dtype].precision > widest.precision:",
        "if False:",
        "verify/test_check.py::test_a_dtype_that_no_array_can_show_is_refused",
    ),
    Mutant(
        "another name suggested for a layer that there is not",
        "verify/unknown_names.py",
        "int(layer[1]) >= count)",
        "int(layer[1]) > count)",
        "verify/test_check.py::TestRefused::test_unknown_names",
    ),
    Mutant(
        "a file cut off in its header told as none",
        "verify/tensor_file.py",
        "if size < max(length, 9):",
        "if size < 9:",
        "cli/test_trace_check_compare.py::test_check_refuses",
    ),
]

MUTANTS = [*NAMES, *SHAPES, *FILES, *LLAMA_CPP, *TRANSFORMERS, *REFUSALS]

"""Bugs of a check: what is held against what, what is inherited, and what the commands say."""

from __future__ import annotations

from catalogue import Mutant

_CHECK = "verify/test_check.py"
_SITES = "verify/test_judged_sites.py"
_FORMATS = "verify/test_formats.py"
_PERSONAS = "verify/test_personas.py"
_INHERITED = "verify/test_inherited.py"
_TRACES = "verify/test_traces.py"
_SUITES = "verify/test_assert_matches_reference.py"
_COMMANDS = "cli/test_trace_check_compare.py"

OPERATIONS = [
    Mutant(
        "another layer's norm weight checked with",
        "verify/build.py",
        "getattr(model.weights.layers[site.layer], site.role)",
        "getattr(model.weights.layers[0], site.role)",
        f"{_CHECK}::test_no_false_alarm",
    ),
    Mutant(
        "another layer's matrix checked with",
        "verify/build.py",
        "layer_matrix(model.weights.layers[site.layer], site.role)",
        "layer_matrix(model.weights.layers[0], site.role)",
        f"{_CHECK}::test_no_false_alarm",
    ),
    Mutant(
        "embedding taken for the head's matrix",
        "verify/build.py",
        "return model.weights.lm_head, None",
        "return model.weights.embed_tokens, None",
        f"{_CHECK}::test_no_false_alarm",
    ),
    Mutant(
        "biases checked in another order",
        "verify/build.py",
        "qkv.bias[rows]",
        "qkv.bias[rows][::-1]",
        f"{_CHECK}::test_no_false_alarm",
    ),
    Mutant(
        "scores checked with the scale of hidden_size",
        "verify/build.py",
        "scale = 1 / math.sqrt(config.head_dim)",
        "scale = 1 / math.sqrt(config.hidden_size / config.num_attention_heads)",
        f"{_CHECK}::test_no_false_alarm",
    ),
    Mutant(
        "the first layer's window for all",
        "verify/build.py",
        "config.window_of(site.layer)",
        "config.window_of(0)",
        f"{_CHECK}::test_pairs_of_tokens[some windows]",
    ),
    Mutant(
        "attention checked with a window off by one",
        "verify/validate.py",
        "Mask(places, places, window, self.keep)",
        "Mask(places, places, window and window + 1, self.keep)",
        f"{_CHECK}::test_no_false_alarm",
    ),
    Mutant(
        "attention checked with padding seen",
        "verify/validate.py",
        "Mask(places, places, window, self.keep)",
        "Mask(places, places, window)",
        f"{_CHECK}::test_no_false_alarm",
    ),
    Mutant(
        "positions of a check counted from one",
        "verify/validate.py",
        "np.maximum(np.cumsum(keep, axis=1) - 1, 0)",
        "np.cumsum(keep, axis=1)",
        "verify/test_diagnose.py::test_nothing_is_said_of_a_correct_port",
    ),
    Mutant(
        "logits of the last token held against the first",
        "verify/build.py",
        "array[:, -rows:] if",
        "array[:, :rows] if",
        f"{_CHECK}::test_last_token_only",
    ),
    Mutant(
        "a mistake in the last token's logits looked for in the first",
        "verify/suspect.py",
        "array[:, -rows:] if",
        "array[:, :rows] if",
        f"{_SITES}::test_the_last_token_with_a_mistake",
    ),
    Mutant(
        "attention checked from queries where probabilities are recorded",
        "verify/sites.py",
        "attention    B S heads D  self_attn.probabilities,self_attn.v_proj;"
        "self_attn.q_rope,self_attn.k_rope,self_attn.v_proj",
        "attention    B S heads D  self_attn.q_rope,self_attn.k_rope,self_attn.v_proj;"
        "self_attn.probabilities,self_attn.v_proj",
        f"{_CHECK}::test_pairs_of_tokens",
    ),
    Mutant(
        "a layer's output checked without its attention",
        "verify/sites.py",
        'residual = (f"{name}.attention_residual", ',
        "residual = (before, ",
        f"{_CHECK}::test_no_false_alarm",
    ),
]

VERDICTS = [
    Mutant(
        "padded tokens' RoPE judged",
        "verify/defined.py",
        ' or (site.operation == "rope" and not recorded.positions_given)',
        "",
        f"{_SITES}::test_rope_of_padding_may_be_anything_where_it_has_no_position",
    ),
    Mutant(
        "padded tokens' RoPE never judged",
        "verify/defined.py",
        "and not recorded.positions_given",
        "",
        f"{_SITES}::test_rope_of_padding_may_be_anything_where_it_has_no_position",
    ),
    Mutant(
        "padded keys excused in the place of padded queries",
        "verify/defined.py",
        "keep[:, None, :, None]",
        "keep[:, None, None, :]",
        f"{_SITES}::test_pairs_of_padding",
    ),
    Mutant(
        "NaN excused where it should not be",
        "verify/check.py",
        'if verdict != "FAIL" and not np.isfinite',
        "if not np.isfinite",
        f"{_SITES}::test_what_is_no_number_fails",
    ),
    Mutant(
        "the mistake of one layer alone looked for in others",
        "verify/check.py",
        "if again or self._diagnosed",
        "if known or self._diagnosed",
        f"{_SITES}::test_layers_with_mistakes_of_their_own",
    ),
    Mutant(
        "one layer diagnosed, whatever it explains",
        "verify/check.py",
        "DIAGNOSED = 3",
        "DIAGNOSED = 1",
        f"{_SITES}::test_layers_with_mistakes_of_their_own",
    ),
]

FORMATS = [
    Mutant(
        "format of the sums not used",
        "verify/check.py",
        "self._accumulate or accumulate_format(found).name",
        "accumulate_format(found).name",
        f"{_FORMATS}::test_sums_in_fewer_bits",
    ),
    Mutant(
        "a trace's sums trusted more than the call's",
        "verify/check.py",
        'accumulate or recorded.metadata.get("accumulate")',
        'recorded.metadata.get("accumulate") or accumulate',
        f"{_FORMATS}::test_sums_in_fewer_bits",
    ),
    Mutant(
        "a trace's dtype trusted more than the call's",
        "verify/check.py",
        'dtype or recorded.metadata.get("dtype")',
        'recorded.metadata.get("dtype") or dtype',
        f"{_FORMATS}::test_the_call_has_the_last_word",
    ),
    Mutant(
        "narrow arrays held to the dtype of others",
        "verify/check.py",
        "FLOATS[self._dtype].precision < found.precision",
        "FLOATS[self._dtype] != found",
        f"{_FORMATS}::test_an_array_has_no_more_bits_than_its_dtype",
    ),
    Mutant(
        "a persona that was asked for ignored",
        "verify/check.py",
        "self._persona = persona or CONTRACT",
        "self._persona = CONTRACT",
        f"{_PERSONAS}::test_allowed_where_the_engine_is_named",
    ),
    Mutant(
        "every persona tried beside the one that was asked for",
        "verify/check.py",
        "self._tries_personas = persona is None",
        "self._tries_personas = True",
        f"{_PERSONAS}::test_not_allowed_where_another_is_named",
    ),
    Mutant(
        "padding judged where a persona explains the rest",
        "verify/check.py",
        "theirs = where_defined(bound, suspect.site, self._recorded)",
        "theirs = bound",
        f"{_PERSONAS}::test_padding_is_nobodys_rounding",
    ),
    Mutant(
        "transformers' norm without its rounding",
        "verify/personas.py",
        "    norm_before_weight=True,\n",
        "",
        f"{_PERSONAS}::test_named[norm]",
    ),
    Mutant(
        "transformers' eager scores in full precision",
        "verify/personas.py",
        'name="transformers", scores=True',
        'name="transformers"',
        f"{_PERSONAS}::test_named[eager]",
    ),
    Mutant(
        "llama.cpp's cache in another format",
        "verify/personas.py",
        'kv_cache="float16"',
        'kv_cache="bfloat16"',
        f"{_PERSONAS}::test_named[cache]",
    ),
    Mutant(
        "flash attention's narrow sums an excuse for all",
        "verify/operations.py",
        "            if persona.weighted_sums is None\n            and ",
        "            if ",
        "verify/test_excess_precision.py::test_personas_that_formats_allow",
    ),
    Mutant(
        "no word of an engine that nobody named",
        "testing/reference.py",
        "    if unnamed:\n",
        "    if False:\n",
        f"{_SUITES}::test_how_the_port_rounds",
    ),
    Mutant(
        "more roundings tried before fewer",
        "verify/personas.py",
        'Persona("float32 phases", phases="float32"),\n        _SDPA,',
        '_SDPA,\n        Persona("float32 phases", phases="float32"),',
        f"{_PERSONAS}::test_named[phases]",
    ),
]

INHERITED = [
    Mutant(
        "an inherited error counted as the site's own",
        "verify/inherited.py",
        "            array = self._recorded.array(name).astype(self._dtype)\n",
        "            pass\n",
        f"{_INHERITED}::test_what_follows_from_an_error_is_not_counted",
    ),
    Mutant(
        "a port's array compared with itself",
        "verify/inherited.py",
        "        self._computed[name] = array\n",
        "        array = self._recorded.arrays.get(name, array)\n"
        "        self._computed[name] = array\n",
        f"{_INHERITED}::test_what_follows_from_an_error_is_not_counted",
    ),
    Mutant(
        "positions ignored where inputs are missing",
        "verify/inherited.py",
        "rope_table(recorded.positions, config, like=x)",
        "rope_table(np.arange(recorded.count), config, like=x)",
        f"{_INHERITED}::test_tokens_see_and_stand_where_they_do",
    ),
    Mutant(
        "windows ignored where inputs are missing",
        "verify/inherited.py",
        "return recorded.allowed(self._model.config.window_of(layer))",
        "return recorded.allowed(None)",
        f"{_INHERITED}::test_tokens_see_and_stand_where_they_do",
    ),
    Mutant(
        "no rounding allowed where our own run has none",
        "verify/seen.py",
        "max(self.yardstick or 0.0, floor)",
        "(self.yardstick or 0.0)",
        f"{_INHERITED}::test_float64",
    ),
    Mutant(
        "growth of rounding errors not allowed for",
        "verify/seen.py",
        "max(self.yardstick or 0.0, floor)",
        "floor",
        f"{_INHERITED}::test_what_rounding_grows_to_is_no_difference",
    ),
    Mutant(
        "the last token's padding looked for at the first",
        "verify/seen.py",
        "keep = recorded.keep[:, -array.shape[1] :]",
        "keep = recorded.keep[:, : array.shape[1]]",
        f"{_INHERITED}::test_the_last_token_beside_padding",
    ),
]

TRACES = [
    Mutant(
        "what this model's config leaves out overlooked",
        "verify/validate.py",
        "if key not in free and ours.get(key) !=",
        "if key not in free and ours.get(key) and ours.get(key) !=",
        f"{_SITES}::test_a_trace_of_another_config",
    ),
    Mutant(
        "one token of any site taken for the last",
        "verify/fit.py",
        "return [shape, last] if site.name in OF_LAST_TOKEN else [shape]",
        "return [shape, last]",
        f"{_TRACES}::test_shapes_that_are_no_sites",
    ),
    Mutant(
        "agreement where there is nothing",
        "verify/validate.py",
        "if not batch or not count:",
        "if False:",
        f"{_TRACES}::test_nothing_to_check_is_no_agreement",
    ),
    Mutant(
        "misspelt metadata overlooked",
        "verify/validate.py",
        "for key in metadata.keys() - _READ:",
        "for key in ():",
        f"{_TRACES}::test_tokens_that_are_none",
    ),
    Mutant(
        "two traces of nothing agree",
        "verify/compare.py",
        "    if not a.size:\n",
        "    if False:\n",
        f"{_TRACES}::test_nothing_to_check_is_no_agreement",
    ),
    Mutant(
        "heads and their channels swapped",
        "verify/fit.py",
        "found.append((*shape[:-1], shape[-1] // width, width))",
        "found.append((*shape[:-1], width, shape[-1] // width))",
        "verify/test_aliases.py::TestShapes::test_channels_before_heads",
    ),
    Mutant(
        "a trace overwritten unasked",
        "verify/trace.py",
        "check_output(file, force)",
        "check_output(file, True)",
        f"{_TRACES}::test_a_file_is_not_overwritten_unless_asked",
    ),
    Mutant(
        "a trace written without its metadata",
        "verify/trace.py",
        " | dict(self.metadata)",
        "",
        f"{_TRACES}::test_a_file_keeps_all_of_a_trace",
    ),
    Mutant(
        "padding lost in a file",
        "verify/trace.py",
        'TOKENS = ("input_ids", "positions", "attention_mask")',
        'TOKENS = ("input_ids", "positions")',
        f"{_TRACES}::test_a_file_keeps_all_of_a_trace",
    ),
    Mutant(
        "weights said to be in the activations' dtype",
        "verify/record.py",
        '"weights": dtype_name(model.weights.embed_tokens.dtype)',
        '"weights": form.name',
        f"{_TRACES}::test_a_trace_says_its_formats",
    ),
    Mutant(
        "recorded probabilities of padding",
        "verify/record.py",
        "layer_masks(logits, model.config, kept, None)",
        "layer_masks(logits, model.config, None, None)",
        f"{_SITES}::test_probabilities_are_recorded_of_what_is_seen",
    ),
    Mutant(
        "only layers recorded",
        "verify/record.py",
        "if site.layer is None or site.layer in kept",
        "if site.layer in kept",
        f"{_TRACES}::test_what_is_outside_the_layers_is_recorded_in_any_case",
    ),
]

COMMANDS = [
    Mutant(
        "the model's weights overwritten",
        "checkpoint/opening.py",
        "files = set(checkpoint._maps)",
        "files: set[Path] = set()",
        f"{_COMMANDS}::test_what_is_read_is_not_written_to",
    ),
    Mutant(
        "the trace overwritten",
        "cli/check.py",
        "model=args.model, read=read)",
        "model=args.model)",
        f"{_COMMANDS}::test_what_is_read_is_not_written_to",
    ),
    Mutant(
        "positions dropped on the way to a check",
        "testing/reference.py",
        '"positions": positions,',
        '"positions": None,',
        f"{_SUITES}::test_positions_and_padding",
    ),
    Mutant(
        "a trace's tokens dropped for none",
        "testing/reference.py",
        "replace(port, **given)",
        "replace(port, **tokens)",
        f"{_SUITES}::test_a_traces_own_tokens_count_unless_others_are_given",
    ),
    Mutant(
        "a persona dropped on the way to a check",
        "testing/reference.py",
        "accumulate=accumulate, persona=persona",
        "accumulate=accumulate",
        f"{_SUITES}::test_how_the_port_rounds",
    ),
    Mutant(
        "a suite that passes what differs",
        "testing/reference.py",
        "if not report.agrees:",
        'if any(result.verdict == "FAIL" for result in report.results):',
        f"{_SUITES}::test_a_difference_without_inputs_is_a_failure",
    ),
    Mutant(
        "--accumulate without effect",
        "cli/check.py",
        "            accumulate=args.accumulate,\n",
        "",
        f"{_COMMANDS}::test_sums_in_fewer_bits",
    ),
    Mutant(
        "--persona without effect",
        "cli/check.py",
        "            persona=args.persona,\n",
        "",
        f"{_COMMANDS}::test_roundings_of_an_engine",
    ),
    Mutant(
        "status 0 beside JSON",
        "cli/check.py",
        "print(json.dumps(report.to_json(), indent=2))\n        return report.exit_status",
        "print(json.dumps(report.to_json(), indent=2))\n        return 0",
        f"{_COMMANDS}::test_check_as_json",
    ),
    Mutant(
        "weights not rounded to the port's dtype",
        "cli/check.py",
        "model = load(args.model, dtype=weights)",
        "model = load(args.model)",
        f"{_COMMANDS}::test_the_command_has_the_last_word_on_weights",
    ),
    Mutant(
        "weights rounded as the trace says, whatever the command says",
        "cli/check.py",
        "args.weights_dtype or stated_weights(trace)",
        "stated_weights(trace) or args.weights_dtype",
        f"{_COMMANDS}::test_the_command_has_the_last_word_on_weights",
    ),
    Mutant(
        "weights rounded to the dtype of the rarest arrays",
        "cli/check.py",
        "for name, _ in dtypes.most_common() if name",
        "for name, _ in reversed(dtypes.most_common()) if name",
        f"{_COMMANDS}::test_most_arrays_say_what_the_weights_were_rounded_to",
    ),
    Mutant(
        "weights rounded only if none is held",
        "cli/check.py",
        "return None if all(",
        "return None if any(",
        f"{_COMMANDS}::test_a_checkpoint_of_several_dtypes",
    ),
    Mutant(
        "the last of a range of layers left out",
        "cli/trace.py",
        "range(int(first), int(last or first) + 1)",
        "range(int(first), int(last or int(first) + 1))",
        f"{_COMMANDS}::test_trace_refuses",
    ),
    Mutant(
        "a trace without the text it is of",
        "cli/trace.py",
        "replace(trace, metadata={**trace.metadata, **said}).save(",
        "trace.save(",
        f"{_COMMANDS}::test_a_trace_of_a_text",
    ),
    Mutant(
        "status 0 for traces that come apart",
        "cli/compare.py",
        "return comparison.exit_status",
        "return 0",
        f"{_COMMANDS}::test_traces_that_come_apart",
    ),
]

MUTANTS = [*OPERATIONS, *VERDICTS, *FORMATS, *INHERITED, *TRACES, *COMMANDS]

"""Bugs of the diagnosis: hypotheses that are wrong, and what is made of those that hold."""

from __future__ import annotations

from catalogue import Mutant

_TESTS = "verify/test_diagnose.py"
_NAMED = f"{_TESTS}::test_named_first"
_SEEN = "verify/test_seen.py"

MUTANTS = [
    Mutant(
        "rounding tried before mistakes",
        "verify/diagnose.py",
        "for kind in Kind:",
        "for kind in reversed(Kind):",
        f"{_NAMED}[RoPE position off by one, self_attn.q_rope0]",
    ),
    Mutant(
        "names to try not looked at",
        "verify/diagnose.py",
        "if only is None or h.name in only]",
        "if True]",
        f"{_TESTS}::test_only_the_named_are_tried",
    ),
    Mutant(
        "explanations for what needs none",
        "verify/diagnose.py",
        "return bool(self._wrong.any())",
        "return True",
        f"{_TESTS}::test_an_array_within_its_bound_needs_no_explanation",
    ),
    Mutant(
        "the likeliest last",
        "verify/diagnose.py",
        "found.sort(key=lambda f: max(f.error, least))",
        "found.sort(key=lambda f: -max(f.error, least))",
        f"{_TESTS}::test_bfloat16",
    ),
    Mutant(
        "personas not tried with a mistake",
        "verify/diagnose.py",
        "(CONTRACT, *self._formats.personas)",
        "(CONTRACT,)",
        f"{_TESTS}::test_a_mistake_beside_an_engines_own_roundings",
    ),
    Mutant(
        "every token must show the mistake",
        "verify/diagnose.py",
        "np.where(here, mistaken.exact, right.exact)",
        "mistaken.exact",
        f"{_TESTS}::test_a_mistake_in_a_part_of_the_tokens",
    ),
    Mutant(
        "tokens that are right said to be wrong",
        "verify/diagnose.py",
        "else _at(wrong, change.detail)",
        "else _at(tokens, change.detail)",
        f"{_TESTS}::test_a_mistake_in_a_part_of_the_tokens",
    ),
    Mutant(
        "padding judged",
        "verify/defined.py",
        "if keep is None:\n        return None\n    if site.pairwise",
        "if True:\n        return None\n    if site.pairwise",
        f"{_TESTS}::test_attention_of_padding_may_be_anything",
    ),
    Mutant(
        "a formula without rounding",
        "verify/hypotheses/hypothesis.py",
        "limit = growth * self.magnitude + out",
        "limit = 0 * growth * self.magnitude + out",
        f"{_NAMED}[mean subtracted, input_layernorm]",
    ),
    Mutant(
        "permutation undone where it should be done",
        "verify/hypotheses/projections.py",
        "yield from _moved(linear, suspect, np.argsort(rows))\n\n\ndef _permuted",
        "yield from _moved(linear, suspect, rows)\n\n\ndef _permuted",
        f"{_NAMED}[RoPE permutation undone twice, self_attn.q_proj]",
    ),
    Mutant(
        "head counts mixed up",
        "verify/hypotheses/projections.py",
        'queries = suspect.site.role == "self_attn.q_proj"',
        "queries = True",
        f"{_NAMED}[RoPE permutation left in, self_attn.k_proj]",
    ),
    Mutant(
        "weights of the layer itself for another's",
        "verify/hypotheses/projections.py",
        "number = suspect.site.layer if layer is None else layer",
        "number = suspect.site.layer",
        f"{_NAMED}[another layer's weights, self_attn.v_proj]",
    ),
    Mutant(
        "positions looked for in too few",
        "verify/hypotheses/rope_solved.py",
        "last = max(2 * turns.shape[1], int(stated.max()) + 2)",
        "last = int(stated.max()) + 2",
        f"{_NAMED}[RoPE at other positions, self_attn.q_rope2]",
    ),
    Mutant(
        "frequencies not refined",
        "verify/hypotheses/rope_solved.py",
        "for _ in range(3):",
        "for _ in range(0):",
        f"{_NAMED}[RoPE with other frequencies, self_attn.q_rope]",
    ),
    Mutant(
        "mask off by one the other way",
        "verify/hypotheses/masks.py",
        "keys <= queries + causal",
        "keys <= queries - causal",
        f"{_NAMED}[a token sees the next, self_attn.attention0]",
    ),
    Mutant(
        "keys repeated in the place of tiled",
        "verify/hypotheses/masks.py",
        "return [head % groups for head in range(heads)]",
        "return [head * groups // heads for head in range(heads)]",
        f"{_NAMED}[key heads tiled, self_attn.attention]",
    ),
    Mutant(
        "chunks that end too early",
        "verify/hypotheses/caches.py",
        "slots[: stop - start] = np.arange(start, stop)",
        "slots[: stop - start] = np.arange(stop - 1, start - 1, -1)",
        f"{_NAMED}[cache written from its start, self_attn.attention]",
    ),
    Mutant(
        "slots that hold the same counted once",
        "verify/hypotheses/caches.py",
        "np.add.at(counts[batch, query - low], slots[row], 1)",
        "counts[batch, query - low, slots[row]] = 1",
        f"{_NAMED}[cache written from its start, self_attn.attention]",
    ),
    Mutant(
        "TF32 of 11 bits",
        "verify/hypotheses/precision.py",
        "bits &= np.uint32(0xFFFFE000)",
        "bits &= np.uint32(0xFFFFF000)",
        f"{_TESTS}::test_tf32",
    ),
    Mutant(
        "any error taken for narrow sums",
        "verify/hypotheses/precision.py",
        "if abs(np.sum(error * exact)) > 0.3 * size * whole:",
        "if False:",
        f"{_TESTS}::test_a_scale_is_no_rounding",
    ),
    # Sites whose inputs were not recorded.
    Mutant(
        "no mistake looked for before a site",
        "verify/seen.py",
        "(*self._known(seen, only), *self._composed(seen, only))",
        "(*self._known(seen, only),)",
        f"{_SEEN}::test_nothing_but_logits",
    ),
    Mutant(
        "mistakes looked for in a site's own operation only",
        "verify/inherited.py",
        "if len(self.between(site)) > 1:",
        "if True:",
        f"{_SEEN}::test_a_mistake_at_a_site_that_was_not_recorded",
    ),
    Mutant(
        "later tokens seen of the first few only",
        "verify/seen.py",
        "if run.causal and not self._less(",
        "if not self._less(",
        f"{_SEEN}::test_nothing_but_logits[no causal mask]",
    ),
    Mutant(
        "any mistake taken for an explanation of a difference",
        "verify/seen.py",
        "            if left <= seen.allowed\n",
        "            if left < math.inf\n",
        f"{_SEEN}::test_noise_is_not_explained",
    ),
    Mutant(
        "the weights of the layer itself for another's",
        "verify/hypotheses/composed.py",
        "self._places.get(layer, layer)",
        "layer",
        f"{_SEEN}::test_the_outputs_of_layers[another layer's weights]",
    ),
    Mutant(
        "the mistake made, and the port's array put in over it",
        "verify/inherited.py",
        "self.used[name] = self._tap(name, array)",
        "self.used[name] = array",
        f"{_SEEN}::test_the_outputs_of_layers[RoPE layout interleaved]",
    ),
    Mutant(
        "NaN that comes from nowhere passed over",
        "verify/seen.py",
        'return "DIFFERS" if self.odd else "SEEN"',
        'return "SEEN"',
        f"{_SEEN}::TestNotANumber::test_everywhere",
    ),
    Mutant(
        "NaN of the model taken for the port's",
        "verify/seen.py",
        "and _weights_are_finite(model, site)",
        "",
        f"{_SEEN}::TestNotANumber::test_of_the_model_itself",
    ),
]

"""Bugs to plant in how results of checks are shown, and in the comparison of traces."""

from __future__ import annotations

from catalogue import Mutant

REPORT = "verify/report.py"
TEXT = "verify/text.py"
PAGE = "verify/html.py"
PICTURES = "verify/html_pictures.py"
COMPARE = "verify/compare.py"
COMPARISON = "verify/comparison.py"
DISTANCE = "verify/distance.py"
CHECK = "cli/check.py"

MUTANTS = [
    # What results come to.
    Mutant(
        "the last failure taken for the first",
        REPORT,
        "return next(iter(self.failures), None)",
        "return next(iter(self.failures[::-1]), None)",
        "verify/test_report.py::test_the_first_failure_is_the_first_of_the_forward_pass",
    ),
    Mutant(
        "differences without a bound never the first failure",
        REPORT,
        'if result.verdict in ("FAIL", "DIFFERS"))',
        'if result.verdict == "FAIL")',
        "verify/test_report.py::test_the_first_failure_is_the_first_of_the_forward_pass",
    ),
    Mutant(
        "a difference without a bound passed over",
        REPORT,
        'if found & {"FAIL", "DIFFERS"}:',
        'if found & {"FAIL"}:',
        "verify/test_report.py::test_what_results_come_to",
    ),
    Mutant(
        "a trace of which nothing was checked agrees",
        REPORT,
        'return "SEEN" if compared else "NONE"',
        'return "SEEN"',
        "verify/test_report.py::test_what_results_come_to",
    ),
    Mutant(
        "failures that exit with 0",
        REPORT,
        '{"FAIL": 1, "NONE": 2}.get',
        '{"NONE": 2}.get',
        "cli/test_trace_check_compare.py::test_a_wrong_trace_is_found",
    ),
    Mutant(
        "NaN in JSON",
        "verify/plain.py",
        "if isinstance(value, float) and not math.isfinite(value):",
        "if isinstance(value, float) and math.isinf(value):",
        "verify/test_report.py::test_json_writes_nan_and_inf_as_text",
    ),
    # As text.
    Mutant(
        "two numbers that look the same",
        "verify/layout.py",
        "        if texts[0] != texts[1]:\n            return texts\n",
        "        return texts\n",
        "verify/test_report.py::test_the_headline",
    ),
    Mutant(
        "a ratio above 1 written as 1",
        "verify/layout.py",
        '        if text != "1":\n            break\n',
        "        break\n",
        "verify/test_report.py::test_the_headline",
    ),
    Mutant(
        "the cause said to explain what it does not",
        TEXT,
        "if name not in {e.name for e in r.explanations}]",
        "if not r.explanations]",
        "verify/test_report.py::test_what_the_cause_explains",
    ),
    Mutant(
        "no mistake found where none was looked for",
        TEXT,
        "tried = report.diagnosed and (",
        "tried = True and (",
        "verify/test_report.py::test_where_nothing_explains_it",
    ),
    Mutant(
        "a note for each site",
        TEXT,
        "grouped(noted, lambda r: (r.verdict, r.note)).items()",
        "(((r.verdict, r.note), [r]) for r in noted)",
        "verify/test_report.py::test_notes_are_told_once",
    ),
    Mutant(
        "layers taken for an unbroken range",
        "verify/summary.py",
        "lambda pair: pair[1] - pair[0])",
        "lambda pair: 0)",
        "verify/test_report.py::test_missing_sites_are_told_by_role",
    ),
    Mutant(
        "missing in some layers told as in all",
        TEXT,
        "elif len(numbers) == len(layers):",
        "elif len(numbers) > 1:",
        "verify/test_report.py::test_missing_sites_are_told_by_role",
    ),
    Mutant(
        "the mildest layer of a role shown",
        "verify/summary.py",
        'max(judged, key=lambda p: (p[1].verdict == "FAIL", p[0].ratio)',
        'min(judged, key=lambda p: (p[1].verdict == "FAIL", p[0].ratio)',
        "verify/test_report.py::test_a_line_for_each_role",
    ),
    # As a page.
    Mutant(
        "facts of the trace not escaped",
        PAGE,
        "<dd><code>{escape(fact)}</code></dd>",
        "<dd><code>{fact}</code></dd>",
        "verify/test_html.py::test_strings_are_escaped",
    ),
    Mutant(
        "explanations not escaped",
        PAGE,
        'yield f"<p>{escape(explanation.detail)}</p>"',
        'yield f"<p>{explanation.detail}</p>"',
        "verify/test_html.py::test_strings_are_escaped",
    ),
    Mutant(
        "an error at its limit in the colour of those beyond",
        PICTURES,
        "bisect_left(EDGES, ratio)",
        "bisect_left(EDGES, ratio) + (ratio == 1)",
        "verify/test_report.py::test_bins",
    ),
    Mutant(
        "cells in the wrong layer where one is missing",
        PICTURES,
        "                yield '<td class=\"none\"></td>' if result is None else",
        "                yield '' if result is None else",
        "verify/test_html.py::test_the_map_leaves_room_for_what_was_not_recorded",
    ),
    Mutant(
        "histograms of the first layer only",
        PAGE,
        "zip(*(r.histogram for r in found), strict=True)",
        "zip(*(r.histogram for r in found[:1]), strict=True)",
        "verify/test_html.py::test_histograms_are_of_all_layers",
    ),
    Mutant(
        "the page written over another",
        PAGE,
        "    check_output(file, force)\n",
        "",
        "verify/test_html.py::test_written_whole_or_not_at_all",
    ),
    Mutant(
        "dark on dark",
        "verify/html_style.py",
        "#2d5a87/#e8eaed",
        "#2d5a87/#15181c",
        "verify/test_html.py::test_text_can_be_read_on_every_colour",
    ),
    # Two traces.
    Mutant(
        "the least of the inherited differences",
        COMPARE,
        "max((differences[i].difference for i in inputs if i in differences)",
        "min((differences[i].difference for i in inputs if i in differences)",
        "verify/test_compare.py::test_what_is_inherited",
    ),
    Mutant(
        "attention inherits from queries though probabilities were recorded",
        COMPARE,
        "for route in site.routes:",
        "for route in site.routes[::-1]:",
        "verify/test_compare.py::test_the_most_local_way_is_taken",
    ),
    Mutant(
        "nothing inherited past a site that was not recorded",
        COMPARE,
        "            if name not in common:\n                waiting += routes[name]\n",
        "",
        "verify/test_compare.py::test_what_is_inherited",
    ),
    Mutant(
        "inherited from everything before",
        COMPARE,
        "            if name not in common:\n                waiting += routes[name]\n",
        "            waiting += routes[name]\n",
        "verify/test_compare.py::test_what_is_inherited",
    ),
    Mutant(
        "relative to the second trace",
        DISTANCE,
        "norm += float(np.sum(np.square(x[finite])))",
        "norm += float(np.sum(np.square(y[finite])))",
        "verify/test_compare.py::test_the_difference_is_that_of_the_norms",
    ),
    Mutant(
        "the first block only",
        DISTANCE,
        "for start in range(0, len(a), step):",
        "for start in range(0, len(a), step)[:1]:",
        "verify/test_compare.py::test_the_difference_is_that_of_the_norms",
    ),
    Mutant(
        "NaN passed over in a comparison",
        DISTANCE,
        "        if not np.array_equal(x[~finite], y[~finite], equal_nan=True):\n"
        "            return math.inf\n",
        "",
        "verify/test_compare.py::test_odd_numbers",
    ),
    Mutant(
        "padding compared",
        COMPARE,
        "return None if keep.all() else keep.astype(bool)",
        "return None",
        "verify/test_compare.py::test_padding_does_not_count",
    ),
    Mutant(
        "other tokens compared",
        COMPARE,
        "if not np.array_equal(a, b):",
        "if False:",
        "verify/test_compare.py::test_refusals",
    ),
    Mutant(
        "scores of later tokens compared",
        DISTANCE,
        "        if allowed is not None:\n            x, y",
        "        if False:\n            x, y",
        "verify/test_compare.py::test_scores_of_later_tokens_do_not_count",
    ),
    Mutant(
        "roundings of the finer format",
        COMPARE,
        "max(form.unit_roundoff for form in formats)",
        "min(form.unit_roundoff for form in formats)",
        "verify/test_compare.py::test_ten_times_is_a_suspect",
    ),
    Mutant(
        "everything after a NaN a suspect",
        COMPARISON,
        "            return 1.0\n",
        "            return math.inf\n",
        "verify/test_compare.py::test_what_follows_a_nan_is_no_suspect",
    ),
    Mutant(
        "suspects that exit with 0",
        COMPARISON,
        "return 0 if self.agrees else 1",
        "return 0",
        "cli/test_trace_check_compare.py::test_traces_that_come_apart",
    ),
    # The commands.
    Mutant(
        "a bfloat16 port held against float32 weights",
        CHECK,
        "return None if all(FLOATS[found].holds(FLOATS[name]) for name in stored) else found",
        "return None",
        "cli/test_trace_check_compare.py::test_a_narrower_port_has_rounded_the_weights",
    ),
    Mutant(
        "what a trace says of its weights not read",
        CHECK,
        "weights = args.weights_dtype or stated_weights(trace)",
        "weights = args.weights_dtype",
        "cli/test_trace_check_compare.py::test_a_trace_may_say_its_weights",
    ),
    Mutant(
        "a failure hidden by its page",
        CHECK,
        '        print(f"written {args.html}")\n    return report.exit_status',
        '        print(f"written {args.html}")\n        return 0\n    return report.exit_status',
        "cli/test_trace_check_compare.py::test_check_as_a_page",
    ),
    Mutant(
        "a failure hidden by its JSON",
        CHECK,
        "        print(json.dumps(report.to_json(), indent=2))\n        return report.exit_status",
        "        print(json.dumps(report.to_json(), indent=2))\n        return 0",
        "cli/test_trace_check_compare.py::test_check_as_json",
    ),
    Mutant(
        "a layer too many in a range of layers",
        "cli/trace.py",
        "range(first, last + 1)",
        "range(first, last + 2)",
        "cli/test_trace_check_compare.py::test_a_trace_of_some_sites",
    ),
    Mutant(
        "a range of layers that descends taken for none",
        "cli/trace.py",
        "if last < first:",
        "if False:",
        "cli/test_trace_check_compare.py::test_trace_refuses_what_is_no_list",
    ),
    Mutant(
        "Python's word for an option of the command",
        "cli/__init__.py",
        '.replace("; force=True overwrites", "; --force overwrites")',
        "",
        "cli/test_trace_check_compare.py::test_trace_refuses",
    ),
    Mutant(
        "a correctly rounded sum shown as a near miss",
        "verify/layout.py",
        "if 0.995 <= number < 1:",
        "if False:",
        "verify/test_report.py::test_a_correctly_rounded_sum_is_no_near_miss",
    ),
    Mutant(
        "a zero of the other sign taken for the same bits",
        COMPARE,
        "np.ascontiguousarray(a).view(bits), np.ascontiguousarray(b).view(bits)",
        "a, b",
        "verify/test_compare.py::test_identical_traces",
    ),
    Mutant(
        "hidden scores told as Inf",
        COMPARE,
        "odd if allowed is None else odd & allowed",
        "odd",
        "verify/test_compare.py::test_nan_is_told",
    ),
]

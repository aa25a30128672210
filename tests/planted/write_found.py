"""Write docs/evidence/found_bugs.md: ``python -m tests.planted.write_found``, a minute or two."""

from __future__ import annotations

from tests.planted import port
from tests.planted.bugs import BUGS
from tests.planted.processes import TESTS, in_a_process
from tests.planted.test_ports import (
    GENERAL,
    IN_A_PORT,
    changes,
    report_on,
    run_with_bug,
)

PAGE = TESTS.parent / "docs" / "evidence" / "found_bugs.md"
HEAD = """\
---
orphan: true
---

# Bugs found in ports

How well does `check` do? Each line is a mistake, made on purpose in llama_layers, which then is a
port: it runs {models} small models, whole and through a cache, with and without padding. `check` is
asked for the first wrong site, by how much it exceeds what rounding allows, and which mistake
explains it.

Of {count} mistakes that change an activation, {right} are found at the right first site, which is
the first whose array differs from the array without the mistake. {named} are named for what they
are, or for something with the same numbers; {general} more get a general name, which says where to
look.

`python -m tests.planted.write_found` writes this page, and `pytest -n auto tests/planted` checks
every line of it. `tests/peers/test_planted_bugs.py` does the same with transformers models.

| Mistake | In | First wrong site | Error / limit | `check` says |
| --- | --- | --- | --- | --- |
"""


def main() -> None:
    right = in_a_process(port.run)
    lines, found, named, general = [], 0, 0, 0
    for bug in IN_A_PORT:
        wrong = in_a_process(run_with_bug, BUGS.index(bug))
        case, site = next(iter(changes(wrong, right).items()))
        first = report_on(wrong[case], case, explain=True).first
        assert first is not None, bug.name
        names = list(dict.fromkeys(explanation.name for explanation in first.explanations))
        found += first.site.name == site
        general += bool(names) and names[0] in GENERAL
        named += bool(names) and names[0] not in GENERAL
        ratio = f"{first.judgement.ratio:.2g}" if first.judgement else "input unknown"
        said = "; ".join(names) or "no mistake known here explains it"
        where = bug.path.removeprefix("llama_layers.")
        lines.append(f"| {bug.name} | `{where}` | `{site}` | {ratio} | {said} |\n")
    head = HEAD.format(
        models=len(port.CONFIGS), count=len(lines), right=found, named=named, general=general
    )
    PAGE.write_text(head + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()

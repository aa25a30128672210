"""Write docs/found_bugs.md: ``python tests/mutants/write_found.py``, some 3 minutes on 2 cores.

Each bug that changes a value is planted in a copy of the package, the copy is run as a port would
be, and its activations are checked.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import port

if __name__ != "__mp_main__":  # the processes below import this file, too, but no package yet
    from port_causes import GENERAL, NO_CHANGE
    from random_models import model_of
    from test_ports import MUTANTS, changes, run, trace_of

    from llama_layers.verify import check

ROOT = Path(__file__).parents[2]
HEAD = """\
# Bugs found in ports

How well does `check` do? Each line is a mistake, made on purpose in a copy of llama_layers, which
then is a port: it runs {models} small models, whole and through a cache, with and without padding,
and writes its activations. `check` is asked for the first wrong site, by how much it exceeds what
rounding allows, and which mistake explains it.

Of {count} mistakes that change a value, {right} are found at the right first site, which is the
first whose array is another than without the mistake. {named} are named for what they are, or for
what comes to the same numbers; {general} more are told in general, by what was read off the array.
Bugs in what no activation shows, such as sampling, files and messages, are in
[](planted_bugs.md).

`python tests/mutants/write_found.py` writes this page; `pytest -n auto tests/mutants` holds every
line of it. The same is done to transformers models in `tests/peers/test_planted_bugs.py`.

| Mistake | In | First wrong site | Error / limit | `check` says |
| --- | --- | --- | --- | --- |
"""


def examined(mutant, right, models):
    """What a check of a port with a bug says first, or None if the bug changes nothing."""
    with tempfile.TemporaryDirectory() as directory:
        package = Path(directory, "llama_layers")
        shutil.copytree(ROOT / "llama_layers", package)
        path = package / mutant.file
        path.write_text(path.read_text(encoding="utf-8").replace(mutant.old, mutant.new))
        wrong = run(directory, Path(directory, "port.npz"))
        changed = changes(wrong, right, models)
        if not changed:
            return None
        case = next(iter(changed))
        model = models[case[0]]
        return changed[case], check(trace_of(wrong, case, model), model).first


def main():
    models = {kind: model_of(c, port.weights_of(c)) for kind, c in port.configs().items()}
    with tempfile.TemporaryDirectory() as directory:
        right = run(ROOT, Path(directory, "port.npz"))
    chosen = [mutant for mutant in MUTANTS if mutant.name not in NO_CHANGE]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda mutant: examined(mutant, right, models), chosen))
    lines, rightly, named, general = [], 0, 0, 0
    for mutant, result in zip(chosen, found, strict=True):
        site, first = result
        rightly += first is not None and first.site.name == site
        causes = dict.fromkeys(e.name for e in first.explanations) if first else {}
        told = next(iter(causes), None) in GENERAL
        general += told
        named += bool(causes) and not told
        judgement = first.judgement if first else None
        ratio = f"{judgement.ratio:.2g}" if judgement else "input unknown"
        said = "; ".join(causes) or "no mistake known here explains it"
        lines.append(f"| {mutant.name} | `{mutant.file}` | `{site}` | {ratio} | {said} |")
    counts = {"right": rightly, "named": named, "general": general}
    head = HEAD.format(models=len(models), count=len(chosen), **counts)
    (ROOT / "docs" / "found_bugs.md").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

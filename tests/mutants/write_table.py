"""Write docs/planted_bugs.md: ``python tests/mutants/write_table.py``, some 15 minutes on 2 cores.

Each bug is planted in a copy of the package, and all tests that its catalogue names are run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bound_bugs
import catalogue
import decoder
import decoding
import verify_diagnose_bugs
import verify_recorders_bugs
import verify_report_bugs

ROOT = Path(__file__).parents[2]
SUBJECTS = {
    "Decoder": decoder.MUTANTS,
    "Sampling and generation": decoding.MUTANTS,
    "Bounds of a layer's operations": bound_bugs.MUTANTS,
    "Diagnosis": verify_diagnose_bugs.MUTANTS,
    "Names, files and recorders": verify_recorders_bugs.MUTANTS,
    "Reports and comparisons": verify_report_bugs.MUTANTS,
    "Projection, norm, bounds, configs and checkpoints": catalogue.MUTANTS,
}
SHOWN = 5  # names of tests in a line
HEAD = """\
# Planted bugs

Each line is a mistake, made on purpose in a copy of the package, and the tests that fail with it.
Tests that were written for other mistakes find many; no line is without one. A suite of its own,
`pytest -n auto tests/mutants`, holds each bug to the one test that was written for it.

`python tests/mutants/write_table.py` writes this page. For each subject it runs the tests that
are named for its bugs, on NumPy and array-api-strict, against every bug of the subject; a test
counts as failed if one of its cases fails or is stopped by an error.
"""


def failing(mutant, nodes):
    """The test functions that fail with a bug."""
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(ROOT / "llama_layers", Path(directory, "llama_layers"))
        path = Path(directory, "llama_layers", mutant.file)
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        options = ["-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", "-c", ROOT / "setup.cfg"]
        finished = subprocess.run(
            [sys.executable, "-m", "pytest", *options, "--rootdir", ROOT, *nodes],
            cwd=directory,
            env=os.environ
            | {
                "HYPOTHESIS_PROFILE": "mutants",
                "OPENBLAS_NUM_THREADS": "1",
                "PYTHONPATH": directory,
            },
            capture_output=True,
            text=True,
            check=False,
        )
    found = re.findall(r"^(?:FAILED|ERROR) \S*?(\w+)\.py(?:::(\w+))?", finished.stdout, re.M)
    return sorted({f"{file}: {test}" if test else file for file, test in set(found)})


def section(subject, mutants):
    nodes = sorted({f"{ROOT}/tests/{mutant.killed_by}" for mutant in mutants})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kills = list(pool.map(lambda mutant: failing(mutant, nodes), mutants))
    return written(subject, mutants, kills)


def written(subject, mutants, kills):
    found = Counter(test for tests in kills for test in tests)
    alone = Counter(tests[0] for tests in kills if len(tests) == 1)
    lines = [f"\n## {subject}\n", "| Bug | In | Found by |", "| --- | --- | --- |"]
    for mutant, tests in zip(mutants, kills, strict=True):
        # Those that find the fewest bugs say most about this one.
        names = [f"`{t.partition(': ')[2]}`" for t in sorted(tests, key=lambda t: (found[t], t))]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        line = ", ".join(names[:SHOWN]) or "**none**"
        lines.append(f"| {mutant.name} | `{mutant.file}` | {line}{more} |")
    lines += [
        f"\nOf these {len(mutants)} bugs each test finds:\n",
        "| Test | Bugs | That no other of these tests finds |",
        "| --- | --- | --- |",
    ]
    for test, count in sorted(found.items(), key=lambda item: (-item[1], item[0])):
        file, _, name = test.partition(": ")
        lines.append(f"| `{file}.py::{name}` | {count} | {alone[test] or ''} |")
    return "\n".join(lines) + "\n"


def check(mutants):
    """Refuse to start where a bug has no place any more."""
    for mutant in mutants:
        text = (ROOT / "llama_layers" / mutant.file).read_text(encoding="utf-8")
        assert text.count(mutant.old) == 1, f"stale: {mutant.name}"


if __name__ == "__main__":
    for mutants in SUBJECTS.values():
        check(mutants)
    parts = [section(subject, mutants) for subject, mutants in SUBJECTS.items()]
    (ROOT / "docs" / "planted_bugs.md").write_text(HEAD + "".join(parts), encoding="utf-8")

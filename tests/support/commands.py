"""Commands that are run on traces of a small model."""

from llama_layers.verify import sites
from tests.support.random_models import GQA

IDS = "1,2,3,4,5"
NAMES = [site.name for site in sites(GQA) if not site.optional]


def trouble(run, *arguments):
    """What a refused command says, in one line."""
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    return err

"""How far log-probabilities differ, in nats, and where that comes from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from llama_layers.verify.report.blocks import Block, Sentences, Table
from llama_layers.verify.report.wording import apart, counted, figure

# A difference is like that of another run in the same dtype up to this many times it.
ALIKE = 3.0


@dataclass(frozen=True)
class TokenDifference:
    """The log-probability of one token in two runs.

    Attributes
    ----------
    sequence, token : int
        Its place in the batch: that of the token itself, not of the one before.
    id : int
        Which token it is.
    first, second : float
        The log-probabilities, in nats: the port's and the exact one, or those of two traces.
    normal : float or None
        By how much our own run in the port's dtype differs there.
    """

    sequence: int
    token: int
    id: int
    first: float
    second: float
    normal: float | None = None

    @property
    def difference(self) -> float:
        """The first less the second; 0 where both are infinite alike."""
        return 0.0 if self.first == self.second else self.first - self.second


@dataclass(frozen=True)
class NormalDifference:
    """What our own run in a dtype differs by from float64: an estimate of what is normal.

    Attributes
    ----------
    dtype : str
        The dtype.
    rms, largest : float
        The root mean square over the tokens, and the largest difference, in nats.
    """

    dtype: str
    rms: float
    largest: float


@dataclass(frozen=True)
class SiteContribution:
    """How much the sites up to one add to the difference of log-probabilities.

    The log-probabilities are computed in float64 from the port's array of the site on, and held
    against those from the site before, or from the tokens.

    Attributes
    ----------
    site : str
        The recorded site.
    injected : float
        What was added since the recorded site before it: a root mean square, in nats.
    inherited : float
        The difference up to the site before.
    """

    site: str
    injected: float
    inherited: float


@dataclass(frozen=True)
class LogprobDifference:
    r"""How far the log-probabilities of two runs differ, in nats.

    With :math:`d = \log P_1(t) - \log P_2(t)` over the given tokens: :math:`k_1` is the mean of d
    and :math:`k_3` that of :math:`e^{-d} - 1 + d`; both estimate :math:`KL(P_1 \,\|\, P_2)` if the
    tokens were sampled from the first run (J. Schulman, "Approximating KL divergence", 2020).

    Attributes
    ----------
    names : tuple of str
        What the two are called: "the port" and "float64", say.
    count : int
        How many tokens were compared.
    rms, largest : float
        The root mean square of d, and its largest magnitude.
    k1, k3 : float
        The two estimates.
    kl, largest_kl : float or None
        The divergence itself, where the probabilities of all tokens were recorded: the mean over
        places, and the largest.
    tokens : tuple of TokenDifference
        Those that differ most, the first of them most of all.
    normal : tuple of NormalDifference
        Estimates of what is normal: for the port's dtype, as far as it is known; and, if the
        difference is larger, for the narrower one that it would be normal in, if there is one.
    contributions : tuple of SiteContribution
        In the order of a forward pass, the log-probabilities themselves last.
    """

    names: tuple[str, str]
    count: int
    rms: float
    largest: float
    k1: float
    k3: float
    kl: float | None = None
    largest_kl: float | None = None
    tokens: tuple[TokenDifference, ...] = ()
    normal: tuple[NormalDifference, ...] = ()
    contributions: tuple[SiteContribution, ...] = ()

    def blocks(self) -> list[Block]:
        """Return the summary as blocks of a report.

        Returns
        -------
        list of Block
            Sentences, the tokens that differ most, and what adds to the difference.
        """
        blocks: list[Block] = [Sentences(tuple(self._sentences()))]
        if self.tokens:
            blocks.append(self._tokens())
        if self.contributions:
            rows = [["log-probabilities, nats", "injected", "inherited"]]
            rows += [[c.site, figure(c.injected), figure(c.inherited)] for c in self.contributions]
            remark = "Injected: since the row above. Inherited: before that. Root mean squares."
            blocks.append(Table(rows, remark=remark))
        return blocks

    def _sentences(self) -> Iterator[str]:
        first, second = self.names
        if not math.isfinite(self.rms):
            yield (
                f"Log-probabilities of {counted(self.count, 'token')}: {first} has NaN or Inf "
                f"where {second} has not, or the reverse."
            )
            return
        yield (
            f"Log-probabilities of {counted(self.count, 'token')}: {first} differs from {second} "
            f"by {figure(self.rms)} nats (root mean square), {figure(self.largest)} at most."
        )
        if self.kl is not None and self.largest_kl is not None:
            yield (
                f"KL({first} || {second}): {figure(self.kl)} on average, {figure(self.largest_kl)} "
                "at most."
            )
        yield (
            f"KL({first} || {second}) estimated from these tokens, if {first} sampled them: "
            f"k1 {figure(self.k1)}, k3 {figure(self.k3)}."
        )
        for place, normal in enumerate(self.normal):
            yield self._about(normal, stated=not place)

    def _about(self, normal: NormalDifference, *, stated: bool) -> str:
        """Hold the difference against what is normal in a dtype."""
        own = (
            f"our own run in {normal.dtype} differs from float64 by {figure(normal.rms)}, "
            f"{figure(normal.largest)} at most"
        )
        times = self.rms / normal.rms if normal.rms else math.inf if self.rms else 0.0
        if not stated:
            said = f"--dtype {normal.dtype} would say so"
            return f"If the engine computes in {normal.dtype}: {own} (an estimate); {said}."
        alike = times <= ALIKE
        verdict = "like rounding" if alike else f"{figure(times)} times as much"
        return (
            f"Estimate of what is normal, not a bound: {own}. The port's difference is {verdict}."
        )

    def _tokens(self) -> Table:
        with_normal = self.tokens[0].normal is not None
        names = [name.removeprefix("the ") for name in self.names]
        rows = [["token", "id", *names, "difference", *(["normal"] if with_normal else [])]]
        for token in self.tokens:
            first, second = apart(token.first, token.second)
            normal = [] if token.normal is None else [figure(token.normal)]
            place = str([token.sequence, token.token])
            difference = figure(token.difference)
            rows.append([place, str(token.id), first, second, difference, *normal])
        return Table(rows)

"""Log-probabilities, made of logits: the operation, and the bound on its rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import float_format
from llama_layers.arrays.transfer import to_numpy
from llama_layers.model.logprobs import log_softmax, picked
from llama_layers.verify.bound import Bound
from llama_layers.verify.operation import Operation, Stored
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.roundoff import GROWTHS, Float64Array, compounded, finite_magnitude
from llama_layers.verify.tracked import Tracked, read

# Logits that are held in float64 at a time.
_BLOCK = 2**21
# The fewest logits after which a kernel that reads them once rescales what it has summed.
_RESCALED = 1024


@dataclass(frozen=True, eq=False)
class Logprobs(Operation["Choice"], Generic[Stored]):
    """The log-softmax of logits [B, S, V], of the tokens with the ids [B, S] or of all.

    An id of -1 is that of no known token: the result is NaN there, and the engine's may be
    anything. Only a mistake leaves tokens out that are not `allowed`, of shape [B, S, V].
    """

    inputs = ("logits",)
    logits: Stored
    ids: NDArray[np.int64] | None
    temperature: float = 1.0
    allowed: NDArray[np.bool_] | None = None

    def check(self) -> None:
        """Raise ValueError unless there is an id for each row of logits."""
        if self.ids is not None and self.ids.shape != self.logits.shape[:-1]:
            raise ValueError(
                f"ids: expected shape {list(self.logits.shape[:-1])} of the logits, got "
                f"{list(self.ids.shape)}"
            )

    def evaluate(self, formula: Callable[[Choice], Tracked], how: Rounding) -> Bound:
        """Evaluate a formula on some rows at a time: there may be many logits."""
        self.check()
        float_format("logits", self.logits)
        *shape, size = self.logits.shape
        rows = to_numpy(self.logits).reshape(-1, size)
        ids = None if self.ids is None else self.ids.reshape(-1)
        allowed = None if self.allowed is None else self.allowed.reshape(-1, size)
        step = max(1, _BLOCK // max(1, size))
        bounds = []
        for start in range(0, max(1, len(rows)), step):
            part = slice(start, start + step)
            choice = Choice(
                _tempered(read("logits", rows[part], how), self.temperature),
                None if ids is None else ids[part],
                None if allowed is None else allowed[part],
            )
            bounds.append(formula(choice).bound())
        parts = zip(*((b.exact, b.limit, b.usual) for b in bounds), strict=True)
        return Bound(*(np.concatenate(part).reshape(*shape, -1) for part in parts))

    @staticmethod
    def formula(choice: Choice) -> Tracked:
        """Subtract the logarithm of the sum of exponentials from each logit."""
        return LogSum.of(choice.logits, choice.allowed).below(choice.of(choice.logits))

    def computed(self, logits: np.ndarray) -> np.ndarray:
        """The result for given logits, in the format of their sums."""
        if self.temperature != 1:
            logits = logits / logits.dtype.type(self.temperature)
        if self.allowed is not None:
            logits = np.where(self.allowed, logits, logits.dtype.type(-np.inf))
        found = log_softmax(np, logits)
        if self.ids is None:
            return np.asarray(found)
        chosen = np.asarray(picked(np, found, np.maximum(self.ids, 0)))
        return np.where(self.ids < 0, chosen.dtype.type(np.nan), chosen)[..., None]


def _tempered(logits: Tracked, temperature: float) -> Tracked:
    """Logits over a temperature: divided by it, or multiplied with its rounded inverse."""
    if temperature == 1:
        return logits
    tempered = logits * (1 / temperature)
    return tempered.with_errors((tempered.off, tempered.usual), logits.exact / temperature)


@dataclass(frozen=True, eq=False)
class Choice:
    """Rows of logits [N, V], and which of their tokens were asked for."""

    logits: Tracked
    ids: NDArray[np.int64] | None
    """Of one token in each row; all tokens if it is None."""
    allowed: NDArray[np.bool_] | None

    def of(self, numbers: Tracked) -> Tracked:
        """The numbers [N, V] of the tokens that were asked for: [N, 1] or all."""
        if self.ids is None:
            return numbers if self.allowed is None else numbers.where(self.allowed, -np.inf)
        places = np.maximum(self.ids, 0)[:, None]
        chosen = numbers.moved(lambda array: np.take_along_axis(array, places, axis=-1))
        if self.allowed is not None:
            chosen = chosen.where(np.take_along_axis(self.allowed, places, axis=-1), -np.inf)
        known = self.ids[:, None] >= 0
        chosen = chosen.only(known)
        return chosen.with_errors((chosen.off, chosen.usual), np.where(known, chosen.exact, np.nan))


@dataclass(frozen=True, eq=False)
class LogSum:
    r"""The logarithm of the sum of exponentials in each row, :math:`L = m + \log S`.

    :math:`S = \sum_i e^{a_i - m}`, m the largest. Where logits err by :math:`\alpha_i`, the
    exponentials, which are summed in any order, or rescaled block by block, err by

    .. math:: \eta_i = e^{\Delta_i} (1 + 2 u e)(1 + \rho) - 1, \quad
        \Delta_i = \alpha_i + u (|a_i - m| + \alpha_i + 2 \max \alpha),

    as those of a softmax do (`llama_layers.verify.rules.Weights`), and so S by a relative
    :math:`r = (1 + \sum_i p_i \eta_i)(1 + \gamma_V) - 1`, and its logarithm by
    :math:`-\log(1 - r)`. P. Blanchard, D. Higham and N. Higham, "Accurately computing the
    log-sum-exp and softmax functions", IMA Journal of Numerical Analysis 41, 2021.
    """

    largest: Float64Array
    log: Float64Array
    """The logarithm of S."""
    errors: tuple[Float64Array, Float64Array]
    """Of that, at most and usually."""
    how: Rounding

    @classmethod
    def of(cls, logits: Tracked, allowed: NDArray[np.bool_] | None = None) -> LogSum:
        """The sums of rows [N, V], of the tokens that are allowed; each has one number a row."""
        how, u, n = logits.how, logits.how.sums.unit_roundoff, logits.shape[-1]
        ulps = how.profile.exp_ulps
        with np.errstate(all="ignore"):
            a = logits.exact if allowed is None else np.where(allowed, logits.exact, -np.inf)
            largest = a.max(axis=-1, keepdims=True, initial=-np.inf)
            below = a - largest
            e = np.exp(below)
            total = e[..., ::-1].sum(axis=-1, keepdims=True)
            e /= total
            distance = finite_magnitude(below)
            errors = []
            for error, grow in zip((logits.off, logits.usual), GROWTHS, strict=True):
                off = np.broadcast_to(error, a.shape)
                most = off.max(axis=-1, keepdims=True, initial=0.0)
                delta = off * (1 + u) + u * (distance + 2 * most)
                rescaled = grow((2 * int(ulps) + 1) * -(-n // _RESCALED), u)
                each = compounded(2 * u * ulps, rescaled)
                grown = np.sum(e * np.expm1(delta), axis=-1, keepdims=True)
                share = grown * (1 + each) + each + how.lost * n / total
                r = compounded(share, grow(n, u))
                found = np.where(r < 1, -np.log1p(-np.minimum(r, 1.0)), np.inf)
                errors.append(np.where(np.isfinite(total) & np.isfinite(most), found, np.inf))
            return cls(largest, np.log(total), (errors[0], errors[1]), how)

    @property
    def exact(self) -> Float64Array:
        """The logarithm of the sum of exponentials."""
        return self.largest + self.log

    def below(self, a: Tracked) -> Tracked:
        r"""Subtract them from logits, in any of the usual ways.

        :math:`(a - m) - \log S`, :math:`a - (m + \log S)` and :math:`\log(e^{a - m} / S)`, of an
        exponential that does not underflow, are all within

        .. math:: \alpha + \Delta_L + (1 + u)^2 (2 u e (2 + |\log S| + |y|)
            + u (|a - m| + |L| + 2 |y| + 2)),

        with :math:`\Delta_L` the error of :math:`\log S`.
        """
        how, u = self.how, self.how.sums.unit_roundoff
        ulps = how.profile.exp_ulps
        with np.errstate(all="ignore"):
            exact = (a.exact - self.largest) - self.log
            size = finite_magnitude(exact)
            own = 2 * u * ulps * (2 + np.abs(self.log) + size)
            own += u * (finite_magnitude(a.exact - self.largest) + 2 * size + 2)
            own += u * finite_magnitude(self.exact)
            own = how.own * own * (1 + u) ** 2 + how.lost
            most, usual = (
                e + how.own * s + own for e, s in zip((a.off, a.usual), self.errors, strict=True)
            )
            impossible = exact == -np.inf
            most, usual = (np.where(np.isinf(e) | ~impossible, e, 0.0) for e in (most, usual))
        return Tracked(exact, most, usual, how, how.sums)

"""The maths in decimal numbers of 60 digits, for operations that no fraction holds."""

from __future__ import annotations

from decimal import Context, Decimal, localcontext

import numpy as np

CONTEXT = Context(prec=60, Emin=-999999, Emax=999999)
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620900")


def decimals(values):
    """An array's numbers, exactly, in an array of objects."""
    numbers = np.empty(np.shape(values), object)
    for place in np.ndindex(*np.shape(values)):
        numbers[place] = Decimal(float(values[place]))
    return numbers


def errors(computed, exact):
    """How far an array's numbers are from decimal ones, as floats."""
    with localcontext(CONTEXT):
        apart = [
            float(abs(Decimal(float(computed[place])) - exact[place]))
            for place in np.ndindex(*exact.shape)
        ]
    return np.array(apart).reshape(exact.shape)


def silu(g):
    """g / (1 + e^-g)."""
    with localcontext(CONTEXT):
        return g / (1 + (-g).exp())


def gelu(g):
    """In its form with a hyperbolic tangent, as g / (1 + e^-2z)."""
    with localcontext(CONTEXT):
        z = (2 / PI).sqrt() * (g + Decimal("0.044715") * g**3)
        decay = (-2 * abs(z)).exp()
        return g * (1 if g > 0 else decay) / (1 + decay)


def cosine_and_sine(angle):
    """By their series, of an angle within one turn of zero."""
    with localcontext(CONTEXT):
        angle = angle % (2 * PI)
        cos, sin, term, n = Decimal(0), Decimal(0), Decimal(1), 0
        while abs(term) > Decimal("1e-58"):
            sign = -1 if n // 2 % 2 else 1
            if n % 2:
                sin += sign * term
            else:
                cos += sign * term
            n += 1
            term = term * angle / n
        return cos, sin


def softmax(scores):
    """Of one row; None stands for a key that is hidden."""
    with localcontext(CONTEXT):
        largest = max(score for score in scores if score is not None)
        e = [Decimal(0) if a is None else (a - largest).exp() for a in scores]
        return [number / sum(e) for number in e]


def attention(q, k, v, mask, scale):
    """y [S, heads, D] of q [S, heads, D], k and v [T, kv, D], and a mask [S, T]."""
    (queries, heads, width), (keys, kv_heads, _) = q.shape, k.shape
    q, k, v, scale = decimals(q), decimals(k), decimals(v), Decimal(float(scale))
    y = np.full((queries, heads, width), Decimal(0), object)
    with localcontext(CONTEXT):
        for s, h in np.ndindex(queries, heads):
            kv = h // (heads // kv_heads)
            scores = [sum(q[s, h] * k[t, kv]) * scale if mask[s, t] else None for t in range(keys)]
            if mask[s].any():
                p = softmax(scores)
                y[s, h] = sum(p[t] * v[t, kv] for t in range(keys))
    return y

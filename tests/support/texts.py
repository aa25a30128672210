"""Texts that tokenizers may cut in different ways."""

from __future__ import annotations

import random

ALPHABETS = [
    *"""
abcxyz ABCXYZ stmdrevlSTMDREVL'' 0123456789 ٠٣३Ⅻ½① àéõñßÀÉ абвЖЯ
αβγΔΩ 中国人民漢字 ひらカター 한국어 हिन्दी ไทย עבר العر
.,;:!?()[]{}<>|\\/@#$%^&*-_=+~`'"
""".split(),
    "\uff0c\u3001\uff1b\uff01\uff1f\u300c\u2026\u2014\u201c",
    "      ", "   \t\t", "\n\n\r", "\x00\x7f", "\u0301\u0300\u200b",
    "\U0001f600\U0001f44d\U0001f3fd\u200d\U0001f1e9", "\ue000\U00010400\U0001d400\u01c5\u00ba",
]  # fmt: skip


def random_texts(count):
    """Texts of up to 40 characters, of code, numbers, several scripts, emoji and white space."""
    chosen = random.Random(7)
    for _ in range(count):
        letters = "".join(chosen.sample(ALPHABETS, chosen.randint(1, 4)))
        yield "".join(chosen.choices(letters, k=chosen.randint(1, 40)))

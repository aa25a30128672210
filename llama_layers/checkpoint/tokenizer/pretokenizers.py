"""How byte-level vocabularies cut text before pairs are merged, by GGUF's names for the ways.

A file names the way in ``tokenizer.ggml.pre``. The names, their expressions and what else they
mean are facts of llama.cpp, which defines them (its src/llama-vocab.cpp); it took the expressions
from the models' own tokenizer.json. Each expression cuts what the one before it left in one piece,
and both what it matches and what lies between are pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

_LOWER_ENDINGS = "'s|'t|'re|'ve|'m|'ll|'d"
_ENDINGS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"

_GPT2 = rf"{_LOWER_ENDINGS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)"


def _words(digits: str, letters: str = r"\p{L}", lines: str = r"[\r\n]*") -> str:
    """Cut as Llama 3 and Qwen2 do, which differ in `digits` alone; `lines` end a run of symbols."""
    return (
        rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|{digits}"
        rf"| ?[^\s{letters}\p{{N}}]+{lines}{_SPACES}"
    )


def _cased_words(digits: str, endings: str = "") -> str:
    """Cut words where a lower-case letter is followed by a capital: of the alphabet a to z alone,
    as in llama.cpp; the models' own tokenizers know the case of all letters."""
    lead, upper, lower = r"[^\r\n\p{L}\p{N}]?", r"(?:(?![a-z])\p{L})", r"(?:(?![A-Z])\p{L})"
    return (
        rf"{lead}{upper}*{lower}+{endings}|{lead}{upper}+{lower}*{endings}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACES}"
    )


_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*{_SPACES}"
)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
# The range spans white space, which llama.cpp hides from it.
_IDEOGRAPHS = "(?:(?!\\s)[\u0800-\u9fa5\uac00-\ud7ff])+"
_IDEOGRAPHS_OR_KANA = "[\u4e00-\u9fa5\u3040-\u30ff]+"
# Letters that have a case, by the Unicode of the model's time.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)


@dataclass(frozen=True)
class PreTokenizer:
    """A way to cut text, and what else its name means."""

    patterns: tuple[str, ...]
    """Regular expressions, applied one after the other."""
    ignore_merges: bool = False
    """Whether a piece that is a token is that token, whatever its merges would make of it."""
    adds_bos: bool = False
    """Whether texts begin with the bos token where the file does not say."""


def _rows() -> dict[str, PreTokenizer]:
    three, one = r"\p{N}{1,3}", r"\p{N}"
    llama3, qwen2 = _words(three), _words(one)
    rows = {
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": (
            PreTokenizer((llama3,), ignore_merges=True, adds_bos=True)
        ),
        "glm4 glm5": PreTokenizer((llama3,), ignore_merges=True),
        "dbrx smaug-bpe chatglm-bpe": PreTokenizer((llama3,)),
        "minicpm5": PreTokenizer((three, _words(r"\p{N}+")), ignore_merges=True),
        "qwen2 deepseek-r1-qwen megrez kormo f2llmv2 stablelm2 hunyuan solar-open grok-2": (
            PreTokenizer((qwen2,))
        ),
        "seed-coder": PreTokenizer((_words(one, lines=""),)),
        "superbpe": PreTokenizer((r"\p{N}+", "(?=([0-9]{3})+(?![0-9]))")),
        "qwen35": PreTokenizer((_words(one, r"\p{L}\p{M}"),)),
        "tekken": PreTokenizer((_cased_words(one),), ignore_merges=True, adds_bos=True),
        "gpt-4o llama4 kanana2 talkie minimax-m2": (
            PreTokenizer((_cased_words(three, f"{_ENDINGS}?"),))
        ),
        "gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 mpt olmo jais trillion granite-docling": (
            PreTokenizer((_GPT2,))
        ),
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": (
            PreTokenizer((one, _GPT2))
        ),
        "falcon": PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")),
        "default": PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
        "deepseek-llm": PreTokenizer(
            (
                r"[\r\n]",
                rf"\s?[{_CASED}]+",
                "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001-\u3002]+",
                r"\s+$",
                _IDEOGRAPHS,
                r"\p{N}+",
            )
        ),
        "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _IDEOGRAPHS, one)),
        "deepseek-v3 hunyuan-dense joyai-llm hy_v4": (
            PreTokenizer((three, _IDEOGRAPHS_OR_KANA, _DEEPSEEK_V3))
        ),
        "bloom poro-chat gpt3-finnish": PreTokenizer((_BLOOM,)),
        "viking": PreTokenizer((_BLOOM, one)),
    }
    return {name: row for names, row in rows.items() for name in names.split()}


PRE_TOKENIZERS = _rows()

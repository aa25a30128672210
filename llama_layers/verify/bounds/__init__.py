"""The exact result of each operation, and the bound on the error of a computed one.

One function for each operation, for arrays at hand. All take what is stated of the engine's formats
and roundings as keywords: those of `Rounding.of`.
"""

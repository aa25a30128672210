"""Mistakes and correct variants of a port, which `check` was not made for."""

"""Exceptions that tell files from arguments."""


class ConfigError(ValueError):
    """A config that is incomplete, contradicts itself, or asks for what is not implemented."""


class CheckpointError(ValueError):
    """A checkpoint that is malformed, incomplete, or does not fit its config."""


class BackendError(RuntimeError):
    """An array library that is asked for and cannot compute here; the message says why."""


class TraceError(ValueError):
    """A trace that is malformed, incomplete, or does not fit the model it is held against."""

"""The errors NEO raises on purpose.

Each message says what went wrong, where, what was expected, what was found and what to do. The
command line prints it as one line; everything else that escapes is a bug and keeps its traceback.
"""


class NeoError(Exception):
    """Base class of every error a user can cause and mend."""


class ConfigError(NeoError):
    """An option, environment variable or machine property is unusable."""


class CheckpointError(NeoError):
    """A model folder, weight file or tokenizer is missing, broken or unsupported."""


class CapacityError(NeoError):
    """Memory does not suffice for what was asked."""


class RequestError(NeoError):
    """One request is invalid; others are not affected.

    Args:
        message: As for every error.
        field: The request's field that is to blame, for those who fill in forms.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class StepError(NeoError):
    """A step failed; its requests are lost, the engine serves on."""

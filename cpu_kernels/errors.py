"""The one error that building or loading the CPU kernels raises on purpose."""


class KernelBuildError(RuntimeError):
    """The CPU kernels cannot be built or loaded; the message is one line and says what to do."""

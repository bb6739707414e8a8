"""The errors that the CPU kernels raise on purpose, besides ValueError for a bad argument."""


class KernelBuildError(RuntimeError):
    """The CPU kernels cannot be built or loaded; the message is one line and says what to do."""


class ServiceError(RuntimeError):
    """A step of the attention service failed, or the service was called out of turn."""

"""What can be measured: anything that takes a workload and says what happened to it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from workloads.datasets import PromptMaker
from workloads.records import RunRecord
from workloads.request import WorkloadRequest

OnFinished = Callable[[int], None]
OnProgress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A workload to run.

    Args:
        requests: In order of arrival.
        arrivals: When each arrives, in seconds.
        max_concurrency: Most requests under way at once; None is no limit.
        name: For logs that are kept beside the result.
    """

    requests: Sequence[WorkloadRequest]
    arrivals: Sequence[float]
    max_concurrency: int | None = None
    name: str = ""


class Session(Protocol):
    """A system that is ready to serve."""

    @property
    def maker(self) -> PromptMaker | None:
        """What makes its prompts; None if it needs lengths alone."""

    @property
    def facts(self) -> dict[str, Any]:
        """What is known of it once it runs: versions, KV blocks."""

    def run(self, job: Job, on_finished: OnFinished) -> RunRecord:
        """Serve a workload to its end.

        Args:
            job: The workload.
            on_finished: Called with the number of requests that have ended, now and then.
        """


class System(Protocol):
    """Something to measure."""

    @property
    def name(self) -> str:
        """What kind of system it is: `neo`, `gpu-only`, `vllm`."""

    @property
    def label(self) -> str:
        """For tables and files: its name, and where it runs if that differs in a sweep."""

    @property
    def is_simulated(self) -> bool:
        """Whether its times are predictions."""

    @property
    def options(self) -> dict[str, Any]:
        """What it is asked to be, known before it starts; enters the result and its name."""

    def session(self, on_progress: OnProgress) -> AbstractContextManager[Session]:
        """Start it, and stop it at the end."""

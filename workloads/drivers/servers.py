"""Servers as systems to measure: one that runs already, or one that is started for it."""

import contextlib
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.errors import NeoError
from workloads.bench.system import Job, OnFinished, OnProgress
from workloads.datasets import PromptMaker
from workloads.drivers.http_client import HttpTarget, run_job
from workloads.drivers.probe import answers, served_model, wait_until_ready
from workloads.drivers.server_process import free_port, running
from workloads.drivers.versions import package_versions
from workloads.records import RunRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServer:
    """A server that somebody else started.

    Args:
        name: For tables and files.
        target: Where it is; without a model, the first that it lists is taken.
        maker: Makes its prompts.
        tokenizer: Name of the maker's tokenizer, for the record.
        ready_timeout_s: Longest wait for it to answer.
    """

    name: str
    target: HttpTarget
    maker: PromptMaker
    tokenizer: str | None
    ready_timeout_s: float = 0.0

    @property
    def label(self) -> str:
        """Its name."""
        return self.name

    @property
    def is_simulated(self) -> bool:
        """Never."""
        return False

    @property
    def options(self) -> dict[str, Any]:
        """How it is asked."""
        return {"kind": "server", **_asked(self.target), "as_text": self.maker.as_text}

    @contextlib.contextmanager
    def session(self, on_progress: OnProgress) -> Iterator["HttpSession"]:
        """Wait until it answers."""
        on_progress(f"waiting for {self.target.base_url}")
        target = self.target
        wait_until_ready(target.base_url, target.headers, self.ready_timeout_s)
        if not target.model:
            target = replace(target, model=_listed_model(target))
        facts = {"tokenizer_id": self.tokenizer, "versions": package_versions()}
        yield HttpSession(target, self.maker, facts, lambda: None)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedServer:
    """A server that is started for the measurement.

    Args:
        name: For tables and files.
        command: Program and arguments; `{port}` stands for the port.
        target: How to ask it; its address is set when it runs.
        maker: Makes its prompts.
        tokenizer: Name of the maker's tokenizer, for the record.
        ready_timeout_s: Longest wait for it to answer.
        log: Its output goes here.
        facts: Kept in the result: KV blocks, versions.
    """

    name: str
    command: tuple[str, ...]
    target: HttpTarget
    maker: PromptMaker
    tokenizer: str | None
    ready_timeout_s: float
    log: Path
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its name."""
        return self.name

    @property
    def is_simulated(self) -> bool:
        """Never."""
        return False

    @property
    def options(self) -> dict[str, Any]:
        """The command, and how it is asked."""
        asked = _asked(replace(self.target, base_url="")) | {"as_text": self.maker.as_text}
        return {"kind": "started server", "command": shlex.join(self.command), **asked}

    @contextlib.contextmanager
    def session(self, on_progress: OnProgress) -> Iterator["HttpSession"]:
        """Start it, wait until it answers, and stop it at the end."""
        port = free_port()
        command = [part.replace("{port}", str(port)) for part in self.command]
        on_progress(f"starting {self.name}; its output goes to {self.log}")
        target = replace(self.target, base_url=f"http://127.0.0.1:{port}")
        with running(command, self.log) as process:
            wait_until_ready(target.base_url, {}, self.ready_timeout_s, process.check)
            target = replace(target, model=served_model(target.base_url, {}) or target.model)
            facts = {**self.facts, "tokenizer_id": self.tokenizer, "versions": package_versions()}
            yield HttpSession(target, self.maker, facts, process.check)


class HttpSession:
    """A server that answers.

    Args:
        target: Where it is and how to ask it.
        maker: Makes its prompts.
        facts: What is known of it.
        check: Raises when it has ended.
    """

    def __init__(
        self,
        target: HttpTarget,
        maker: PromptMaker,
        facts: dict[str, Any],
        check: Callable[[], None],
    ) -> None:
        self._target = target
        self._maker = maker
        self._facts = facts
        self._check = check

    @property
    def maker(self) -> PromptMaker | None:
        """What makes its prompts."""
        return self._maker

    @property
    def facts(self) -> dict[str, Any]:
        """What is known of it."""
        target = self._target
        return {
            "model_id": target.model,
            "endpoint_type": target.backend,
            "base_url": target.base_url,
            **self._facts,
        }

    def run(self, job: Job, on_finished: OnFinished) -> RunRecord:
        """Send the workload; say so if the server is gone afterwards."""
        run = run_job(self._target, job, on_finished)
        if any(not request.completed for request in run.requests) and not self._is_there():
            run.details["server_lost"] = True
            run.warnings.append("the server went away before the end")
        return run

    def _is_there(self) -> bool:
        try:
            self._check()
        except NeoError:
            return False
        return answers(self._target.base_url, self._target.headers)


def _listed_model(target: HttpTarget) -> str:
    name = served_model(target.base_url, target.headers)
    if name is None:
        raise NeoError(f"{target.base_url} lists no model: name one with --model")
    return name


def _asked(target: HttpTarget) -> dict[str, Any]:
    return {
        "base_url": target.base_url,
        "model": target.model,
        "backend": target.backend,
        "endpoint": target.endpoint,
        "ignore_eos": target.ignore_eos,
        "temperature": target.temperature,
        "extra_body": target.extra_body,
    }

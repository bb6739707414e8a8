"""Servers as systems to measure: one that runs already, or one that is started for it."""

import contextlib
import random
import shlex
import sys
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
from workloads.request import WorkloadRequest

_PROBE_PROMPT_TOKENS = 4
_REFUSALS = (400, 422)
"""What a server says to fields it does not know."""


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
        target, left_out = without_unknown_fields(target, self.maker)
        if left_out:
            on_progress(f"the server does not know {' and '.join(left_out)}: left out")
        facts = {
            "tokenizer_id": self.tokenizer,
            "versions": package_versions(),
            "fields_left_out": left_out,
        }
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
        command = ["python" if part == sys.executable else part for part in self.command]
        return {"kind": "started server", "command": shlex.join(command), **asked}

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


def without_unknown_fields(target: HttpTarget, maker: PromptMaker) -> tuple[HttpTarget, list[str]]:
    """Return a target that sends nothing the server refuses, and what was left out for that.

    Raises:
        NeoError: The server refuses even a request without them.
    """
    prompt, num_tokens = maker.random_prompt(_PROBE_PROMPT_TOKENS, random.Random(0))
    request = WorkloadRequest(num_prompt_tokens=num_tokens, num_output_tokens=2, prompt=prompt)
    error: str | None = None
    for left_out in ([], ["ignore_eos"], ["ignore_eos", "stream_options"]):
        without: dict[str, Any] = dict.fromkeys(left_out)
        tried = replace(target, extra_body={**without, **target.extra_body})
        job = Job(requests=[request], arrivals=[0.0], name="probe")
        [record] = run_job(tried, job, lambda count: None).requests
        if record.completed:
            return tried, left_out
        error = error or record.error
        if not any(f"HTTP {status}" in (record.error or "") for status in _REFUSALS):
            break
    raise NeoError(f"{target.url} does not answer a short request: {error}")


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

"""What the terminal shows while NEO works. Results go to stdout, everything else to stderr."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from engine.outputs import RequestOutput
from neo_cli.prompts import InputPrompt


@contextlib.contextmanager
def loading_status() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows one line of progress at a time, and clear the line at the end."""
    console = Console(stderr=True)
    with console.status("starting") as status:
        yield lambda line: status.update(line)


class PromptPrinter:
    """Prints outputs: streaming for one prompt, in the order of the prompts for several.

    Args:
        prompts: As the user gave them.
        json_lines: Print one JSON object a prompt.
    """

    def __init__(self, prompts: Sequence[InputPrompt], json_lines: bool) -> None:
        self._prompts = prompts
        self._json_lines = json_lines
        self._latest: dict[int, RequestOutput] = {}
        self._num_printed = 0
        self._first_id: int | None = None
        self._bar: Progress | None = None
        if len(prompts) > 1 and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("generating"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("prompts"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("", total=len(prompts))

    def __enter__(self) -> "PromptPrinter":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, output: RequestOutput) -> None:
        """Print what a new output allows to print."""
        index = int(output.request_id)
        self._latest[index] = output
        if len(self._prompts) == 1 and not self._json_lines:
            sys.stdout.write(output.outputs[0].new_text)
            if output.finished:
                sys.stdout.write("\n")
                self._num_printed += 1
            sys.stdout.flush()
            return
        if output.finished and self._bar is not None:
            self._bar.advance(self._task)
        while (ready := self._latest.get(self._num_printed)) is not None and ready.finished:
            self._print(ready)

    def show_unfinished(self) -> None:
        """Print what there is of prompts that were not finished."""
        if len(self._prompts) == 1 and not self._json_lines:
            sys.stdout.write("\n")
            return
        while self._num_printed < len(self._prompts):
            output = self._latest.get(self._num_printed)
            if output is None:
                self._num_printed += 1
            else:
                self._print(output)

    def _print(self, output: RequestOutput) -> None:
        prompt = self._prompts[self._num_printed]
        self._num_printed += 1
        if self._json_lines:
            print(json.dumps(_as_json(prompt, output), ensure_ascii=False), flush=True)
            return
        shown = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
        print(f"[{self._num_printed}] {shown}\n{output.outputs[0].text}\n", flush=True)


def _as_json(prompt: InputPrompt, output: RequestOutput) -> dict[str, object]:
    completion = output.outputs[0]
    metrics = output.metrics
    logprobs = completion.logprobs
    return {
        "prompt": prompt,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_output_tokens": len(completion.token_ids),
        "logprobs": None if logprobs is None else [asdict(item) for item in logprobs],
        "ttft_s": metrics.ttft_s,
        "num_preemptions": metrics.num_preemptions,
    }

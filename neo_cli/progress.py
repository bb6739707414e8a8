"""What the terminal shows while NEO works. Results go to stdout, everything else to stderr."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from engine.outputs import RequestOutput
from neo_cli.prompts import InputPrompt

_SPINNER_WIDTH = 3


@contextlib.contextmanager
def loading_status() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows one line of progress at a time, and clear the line at the end.

    Nothing is shown where standard error is no terminal.
    """
    console = Console(stderr=True)

    def one_line(text: str) -> Text:
        line = Text(text)  # as it is: brackets in a path are no markup
        line.truncate(console.width - _SPINNER_WIDTH, overflow="ellipsis")
        return line

    with console.status("starting") as status:
        yield lambda line: status.update(one_line(line))


def print_line(line: str) -> None:
    """Show a line of progress for good, on standard error."""
    print(line, file=sys.stderr, flush=True)


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
                redirect_stdout=False,  # it would send the results to stderr
                redirect_stderr=False,
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
        """Print what there is of prompts that were not finished; call it last."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
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
        if self._bar is None:
            self._print_result(output)
            return
        self._bar.stop()  # takes the bar away: it may be on the same terminal as the results
        self._print_result(output)
        self._bar.start()

    def _print_result(self, output: RequestOutput) -> None:
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
        "finish_reason": completion.finish_reason or "abort",  # printed unfinished: interrupted
        "stop_reason": completion.stop_reason,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_output_tokens": len(completion.token_ids),
        "logprobs": None if logprobs is None else [asdict(item) for item in logprobs],
        "ttft_s": metrics.ttft_s,
        "num_preemptions": metrics.num_preemptions,
    }

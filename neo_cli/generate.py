"""`neo generate`: complete or answer prompts from the terminal."""

import contextlib
import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.config import EngineConfig
from engine.errors import ConfigError, RequestError, StepError
from engine.sampling_params import SamplingParams
from engine.scheduling.scheduler import SchedulerConfig
from neo_cli import options as opt
from neo_cli.options import (
    INTERRUPTED,
    OUTPUT_PANEL,
    SAMPLING_PANEL,
    STRUCTURE_PANEL,
    default,
    option,
)
from neo_cli.prompts import ChatPrompt, InputPrompt, read_prompts
from neo_cli.structured import read_structured_output

if TYPE_CHECKING:
    from engine.llm import LLM

DEFAULT_MAX_TOKENS = 256


def _sampling_default(name: str) -> Any:
    return default(SamplingParams, name)


def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="Prompts; standard input is one if there are none, or for `-`."),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        option(
            "Prompts from a file: text, one a line, or .jsonl.",
            OUTPUT_PANEL,
            "--prompt-file",
            "-f",
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        option(
            "Use the model's chat template or not; it is used if there is one.",
            OUTPUT_PANEL,
            "--chat/--raw",
        ),
    ] = None,
    system: Annotated[str | None, option("System message of the chat.", OUTPUT_PANEL)] = None,
    json_lines: Annotated[
        bool, option("Print one JSON object a prompt.", OUTPUT_PANEL, "--json")
    ] = False,
    stats: Annotated[
        bool, option("Print a table of statistics last.", OUTPUT_PANEL, "--stats")
    ] = False,
    max_tokens: Annotated[
        int, option("Most tokens to generate.", SAMPLING_PANEL, "--max-tokens", "-n")
    ] = DEFAULT_MAX_TOKENS,
    min_tokens: Annotated[
        int, option("No stop condition holds before this many tokens.", SAMPLING_PANEL)
    ] = _sampling_default("min_tokens"),
    temperature: Annotated[
        float, option("0 is greedy.", SAMPLING_PANEL, "--temperature", "-t")
    ] = _sampling_default("temperature"),
    top_k: Annotated[
        int, option("Sample from the k likeliest tokens; 0 is all.", SAMPLING_PANEL)
    ] = _sampling_default("top_k"),
    top_p: Annotated[
        float, option("Sample from the likeliest tokens of this total.", SAMPLING_PANEL)
    ] = _sampling_default("top_p"),
    min_p: Annotated[
        float, option("Drop tokens below this share of the likeliest.", SAMPLING_PANEL)
    ] = _sampling_default("min_p"),
    repetition_penalty: Annotated[
        float, option("Above 1 discourages tokens seen before.", SAMPLING_PANEL)
    ] = _sampling_default("repetition_penalty"),
    presence_penalty: Annotated[
        float, option("Subtracted from logits of generated tokens.", SAMPLING_PANEL)
    ] = _sampling_default("presence_penalty"),
    frequency_penalty: Annotated[
        float, option("The same, once per occurrence.", SAMPLING_PANEL)
    ] = _sampling_default("frequency_penalty"),
    seed: Annotated[
        int | None,
        option("Makes sampling the same each time; also seeds dummy weights.", SAMPLING_PANEL),
    ] = _sampling_default("seed"),
    logit_bias: Annotated[
        list[str] | None,
        option("TOKEN_ID=BIAS, added to a token's logit; repeatable.", SAMPLING_PANEL),
    ] = None,
    stop: Annotated[
        list[str] | None, option("A string that ends the text; repeatable.", SAMPLING_PANEL)
    ] = None,
    stop_token_ids: Annotated[
        list[int] | None,
        option("A token id that ends the text; repeatable.", SAMPLING_PANEL, "--stop-token-id"),
    ] = None,
    include_stop_str_in_output: Annotated[
        bool,
        option("Keep the stop string in the text.", SAMPLING_PANEL, "--include-stop-str-in-output"),
    ] = _sampling_default("include_stop_str_in_output"),
    ignore_eos: Annotated[
        bool, option("Go on after the end-of-sequence token.", SAMPLING_PANEL, "--ignore-eos")
    ] = _sampling_default("ignore_eos"),
    skip_special_tokens: Annotated[
        bool, option("Leave special tokens out of the text.", SAMPLING_PANEL)
    ] = _sampling_default("skip_special_tokens"),
    logprobs: Annotated[
        int | None,
        option("Log-probabilities of this many likeliest tokens, with --json.", SAMPLING_PANEL),
    ] = _sampling_default("logprobs"),
    json_schema: Annotated[
        str | None,
        option("The output follows this JSON schema, text or a file.", STRUCTURE_PANEL),
    ] = None,
    regex: Annotated[
        str | None, option("The output matches this regular expression.", STRUCTURE_PANEL)
    ] = None,
    choice: Annotated[
        list[str] | None,
        option("The output is one of these strings; repeatable.", STRUCTURE_PANEL),
    ] = None,
    grammar: Annotated[
        Path | None,
        option(
            "The output follows the grammar in this file (Lark, as llguidance reads it).",
            STRUCTURE_PANEL,
        ),
    ] = None,
    model: opt.Model = default(EngineConfig, "model"),
    revision: opt.Revision = default(EngineConfig, "revision"),
    load_format: opt.LoadFormat = default(EngineConfig, "load_format"),
    dtype: opt.Dtype = default(EngineConfig, "dtype"),
    device: opt.Device = default(EngineConfig, "device"),
    max_model_len: opt.MaxModelLen = default(EngineConfig, "max_model_len"),
    block_size: opt.BlockSize = default(EngineConfig, "block_size"),
    device_kv_blocks: opt.DeviceKvBlocks = default(EngineConfig, "device_kv_blocks"),
    host_kv_gb: opt.HostKvGb = default(EngineConfig, "host_kv_gb"),
    gpu_memory_utilization: opt.GpuMemoryUtilization = default(
        EngineConfig, "gpu_memory_utilization"
    ),
    threads: opt.Threads = default(EngineConfig, "threads"),
    max_num_seqs: opt.MaxNumSeqs = default(SchedulerConfig, "max_num_seqs"),
    max_num_batched_tokens: opt.MaxNumBatchedTokens = default(
        SchedulerConfig, "max_num_batched_tokens"
    ),
    mode: opt.Mode = default(SchedulerConfig, "mode"),
    tpot_limit_ms: opt.TpotLimitMs = default(SchedulerConfig, "tpot_limit_ms"),
    pcie_attention: opt.PcieAttention = default(EngineConfig, "pcie_attention"),
    enforce_eager: opt.EnforceEager = default(EngineConfig, "enforce_eager"),
    async_scheduling: opt.AsyncScheduling = default(EngineConfig, "async_scheduling"),
    log_steps: opt.LogSteps = default(EngineConfig, "log_steps"),
) -> int:
    """Complete or answer prompts.

    One prompt streams its text; several show a progress bar and print in their order. Ctrl-C stops
    and keeps what is there.
    """
    try:
        params = SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
            logit_bias=_parse_logit_bias(logit_bias or []),
            stop=tuple(stop or ()),
            stop_token_ids=tuple(stop_token_ids or ()),
            ignore_eos=ignore_eos,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            logprobs=logprobs,
            structured_output=read_structured_output(json_schema, regex, choice, grammar),
            skip_special_tokens=skip_special_tokens,
            include_stop_str_in_output=include_stop_str_in_output,
        )
        config = EngineConfig(
            model=model,
            revision=revision,
            load_format=load_format,
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            block_size=block_size,
            device_kv_blocks=device_kv_blocks,
            host_kv_gb=host_kv_gb,
            gpu_memory_utilization=gpu_memory_utilization,
            threads=threads,
            seed=_engine_seed(seed, load_format),
            scheduler=SchedulerConfig(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                mode=mode,
                tpot_limit_ms=tpot_limit_ms,
            ),
            pcie_attention=pcie_attention,
            enforce_eager=enforce_eager,
            async_scheduling=async_scheduling,
            log_steps=log_steps,
        )
        if logprobs is not None and not json_lines:
            raise RequestError("logprobs are printed with --json only")
        given = read_prompts(prompts or [], prompt_file)
    except (ConfigError, RequestError) as error:
        raise typer.BadParameter(str(error)) from error
    return _Generation(config, params, chat, system, json_lines, stats).run(given)


def _engine_seed(seed: int | None, load_format: str) -> int:
    """Return a fresh seed for sampling if none was given; dummy weights are the same each time."""
    if seed is not None or load_format == "dummy":
        return seed or 0
    return secrets.randbits(63)


def _parse_logit_bias(items: list[str]) -> dict[int, float]:
    biases = {}
    for item in items:
        token_id, _, bias = item.partition("=")
        try:
            biases[int(token_id)] = float(bias)
        except ValueError as error:
            raise RequestError(f"logit_bias must be TOKEN_ID=BIAS, got {item!r}") from error
    return biases


@dataclass(frozen=True, slots=True)
class _Generation:
    """One run of the command, after its options were checked."""

    config: EngineConfig
    params: SamplingParams
    chat: bool | None
    system: str | None
    json_lines: bool
    stats: bool

    def run(self, prompts: list[InputPrompt]) -> int:
        """Generate for all prompts and return the exit code."""
        from engine.llm import LLM
        from neo_cli.progress import loading_status

        with loading_status() as on_progress:
            engine = LLM.from_config(self.config, on_progress)
        with engine as llm:
            tokens = [self._tokens(llm, prompt, at) for at, prompt in enumerate(prompts, start=1)]
            failures: list[str] = []
            interrupted = self._generate(llm, prompts, tokens, failures)
            if self.stats:
                self._print_stats(llm)
        if failures:
            raise StepError("; ".join(failures))
        return INTERRUPTED if interrupted else 0

    def _tokens(self, llm: "LLM", prompt: InputPrompt, number: int) -> list[int]:
        """Return a prompt's tokens, through the chat template if it is to be used."""
        try:
            if self.chat is False and not isinstance(prompt, str):
                raise RequestError("messages need the chat template; leave out --raw")
            if self.chat or (self.chat is None and llm.engine.has_chat_template):
                return llm.engine.chat_prompt(self._messages(prompt))
            if self.system is not None:
                raise RequestError("--system needs a chat template; the model or --raw has none")
            return llm.engine.tokenize(prompt if isinstance(prompt, str) else "")
        except RequestError as error:
            raise RequestError(f"prompt {number}: {error}") from error

    def _messages(self, prompt: InputPrompt) -> ChatPrompt:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.system is None:
            return messages
        return [{"role": "system", "content": self.system}, *messages]

    def _generate(
        self,
        llm: "LLM",
        prompts: list[InputPrompt],
        tokens: list[list[int]],
        failures: list[str],
    ) -> bool:
        """Generate and print, note failed prompts, and return whether the user interrupted it."""
        from neo_cli.progress import PromptPrinter

        printer = PromptPrinter(prompts, self.json_lines)
        try:
            with contextlib.closing(llm.stream(tokens, self.params)) as stream, printer:
                for output in stream:
                    printer.show(output)
                    if output.outputs[0].finish_reason == "error":
                        number = int(output.request_id) + 1
                        failures.append(f"prompt {number}: {output.outputs[0].stop_reason}")
        except KeyboardInterrupt:
            printer.show_unfinished()
            return True
        return False

    def _print_stats(self, llm: "LLM") -> None:
        from neo_cli.stats import print_stats, stats_dict

        if self.json_lines:
            print(json.dumps({"stats": stats_dict(llm.engine)}))
        else:
            print_stats(llm.engine)

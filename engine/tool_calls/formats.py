"""The ways of writing tool calls that NEO reads, and which one a model uses."""

import json
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from engine.errors import ConfigError
from engine.structured_output import StructuredOutput
from engine.tool_calls.hermes import HermesParser
from engine.tool_calls.llama3_json import Llama3JsonParser
from engine.tool_calls.mistral import MistralParser, mistral_call_id
from engine.tool_calls.parser import ToolCallParser
from engine.tool_calls.tools import Tool

_WRITING = {"whitespace_pattern": r"\x20"}
"""Forced arguments are written on one line, with at most one blank between their parts."""

MakeParser = Callable[[Collection[str], bool], ToolCallParser]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallFormat:
    """One way of writing calls.

    Args:
        name: What `--tool-call-parser` calls it.
        needs_special_tokens: Whether calls can only be seen with special tokens in the text.
        make_parser: Makes a parser; given the names of the functions, and whether the output is
            nothing but calls because `grammar` made it so.
        begin, end: What stands around all calls where they are forced.
        call: One call, with `NAME` and `ARGUMENTS` in their places.
        between: What stands between two calls.
    """

    name: str
    make_parser: MakeParser
    needs_special_tokens: bool = False
    begin: str = ""
    call: tuple[str, str, str]
    between: str
    end: str = ""

    def grammar(self, tools: Sequence[Tool], *, several: bool) -> StructuredOutput:
        """Return the form of an output that is nothing but calls.

        Args:
            tools: The functions that may be called.
            several: Whether more than one call may be written.
        """
        head, middle, tail = self.call
        rules = []
        for at, tool in enumerate(tools):
            schema = json.dumps({**tool.parameters, "x-guidance": _WRITING})
            before = json.dumps(head + json.dumps(tool.name) + middle)
            rules.append(f"call_{at}: {before} arguments_{at} {json.dumps(tail)}")
            rules.append(f"arguments_{at}: %json {schema}")
        any_call = " | ".join(f"call_{at}" for at in range(len(tools)))
        more = f" ({json.dumps(self.between)} call)*" if several else ""
        parts = [json.dumps(self.begin)] if self.begin else []
        parts += [f"call{more}"] + ([json.dumps(self.end)] if self.end else [])
        start = f"start: {' '.join(parts)}\ncall: {any_call}\n"
        return StructuredOutput(grammar=start + "\n".join(rules))


def _random_id() -> str:
    return f"call_{secrets.token_hex(12)}"


HERMES = ToolCallFormat(
    name="hermes",
    make_parser=lambda names, forced: HermesParser(_random_id),
    call=('<tool_call>\n{"name": ', ', "arguments": ', "}\n</tool_call>"),
    between="\n",
)
LLAMA3_JSON = ToolCallFormat(
    name="llama3_json",
    make_parser=lambda names, forced: Llama3JsonParser(_random_id, names),
    call=('{"name": ', ', "parameters": ', "}"),
    between="; ",
)
MISTRAL = ToolCallFormat(
    name="mistral",
    make_parser=lambda names, forced: MistralParser(mistral_call_id, in_calls=forced),
    needs_special_tokens=True,
    begin="[",
    call=('{"name": ', ', "arguments": ', "}"),
    between=", ",
    end="]",
)
FORMATS = {tool_format.name: tool_format for tool_format in (HERMES, LLAMA3_JSON, MISTRAL)}


def find_format(
    template: str | Mapping[str, str] | None, override: str | None = None
) -> ToolCallFormat | None:
    """Return the way in which a model writes tool calls.

    Args:
        template: Its chat template, or several by name: transformers takes `tool_use` for chats
            with tools.
        override: A name out of `FORMATS` that is taken whatever the template says.

    Returns:
        None if the template knows no tools, or writes calls in a way that NEO does not read.

    Raises:
        ConfigError: There is no format of that name.
    """
    if override is not None:
        if override not in FORMATS:
            raise ConfigError(
                f"tool_call_parser must be one of {', '.join(FORMATS)}, got {override}"
            )
        return FORMATS[override]
    if isinstance(template, Mapping):
        template = template.get("tool_use")
    if template is None or "tools" not in template:
        return None
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<tool_call>" in template:
        return None if "<function=" in template else HERMES  # Qwen3-Coder writes XML there
    if "<|start_header_id|>" in template and '"parameters"' in template:
        return LLAMA3_JSON
    return None

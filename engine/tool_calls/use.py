"""What the tools of one chat request mean for its prompt, its sampling and its output."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.errors import RequestError
from engine.sampling_params import SamplingParams
from engine.structured_output import StructuredOutput
from engine.tool_calls.formats import ToolCallFormat
from engine.tool_calls.parser import ToolCallParser
from engine.tool_calls.tools import Tool, parse_tools

_CHOICES = '"none", "auto", "required" or {"type": "function", "function": {"name": ...}}'


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """How a request may call functions. Make one with `of`.

    Attributes:
        tools: The functions that the template shows to the model.
        tool_format: How the model writes calls.
        structured_output: What forces the model to call; None if it is free to.
    """

    tools: tuple[Tool, ...]
    tool_format: ToolCallFormat
    structured_output: StructuredOutput | None = None

    @classmethod
    def of(
        cls,
        tool_format: ToolCallFormat | None,
        tools: Sequence[object] | None,
        tool_choice: object = None,
        *,
        parallel_tool_calls: bool = True,
    ) -> "ToolUse | None":
        """Read a request's `tools`, `tool_choice` and `parallel_tool_calls`.

        Args:
            tool_format: The model's, from `find_format`.
            tools: As in OpenAI's API.
            tool_choice: `none`, `auto` (the default where there are tools), `required`, or an
                object that names one function.
            parallel_tool_calls: Whether a forced message may hold several calls.

        Returns:
            None if the request is one without tools, or its choice is `none`.

        Raises:
            RequestError: A tool or the choice is malformed, or the model knows no tools.
        """
        if not tools:
            if tool_choice in (None, "none", "auto"):
                return None
            raise RequestError("tool_choice needs tools, and tools is empty", field="tool_choice")
        parsed = parse_tools(tools)
        named = _named(tool_choice, parsed)
        if tool_choice == "none":
            return None
        if tool_format is None:
            raise RequestError(
                "tools cannot be used: the model's chat template knows none, or its way of calling "
                "them is unknown; if it is not, start the server with --tool-call-parser",
                field="tools",
            )
        grammar = None
        if named is not None:
            grammar = tool_format.grammar([named], several=False)
        elif tool_choice == "required":
            grammar = tool_format.grammar(parsed, several=parallel_tool_calls)
        return cls(tools=tuple(parsed), tool_format=tool_format, structured_output=grammar)

    @property
    def template_tools(self) -> list[Mapping[str, Any]]:
        """What `chat_prompt` takes as `tools`."""
        return [tool.definition for tool in self.tools]

    def sampling_params(self, params: SamplingParams) -> SamplingParams:
        """Return the parameters that the request's own turn into.

        Raises:
            RequestError: A call is forced, and the request wants another form of output.
        """
        if self.structured_output is not None:
            if params.structured_output is not None:
                raise RequestError(
                    f"tool_choice forces a call, and {params.structured_output.kind} another form "
                    "of output; use only one of them",
                    field="tool_choice",
                )
            return replace(params, structured_output=self.structured_output)
        if self.tool_format.needs_special_tokens:
            return replace(params, skip_special_tokens=False)
        return params

    def parser(self) -> ToolCallParser:
        """Return a parser for one completion."""
        names = [tool.name for tool in self.tools]
        return self.tool_format.make_parser(names, self.structured_output is not None)


def _named(tool_choice: object, tools: Sequence[Tool]) -> Tool | None:
    """Return the function that the choice names; None if it names none."""
    if tool_choice in (None, "none", "auto", "required"):
        return None
    function = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(tool_choice, Mapping) or tool_choice.get("type") != "function" or not name:
        raise RequestError(
            f"tool_choice must be {_CHOICES}, got {tool_choice!r}", field="tool_choice"
        )
    for tool in tools:
        if tool.name == name:
            return tool
    raise RequestError(
        f"tool_choice names the function {name!r}, which is not among the tools",
        field="tool_choice",
    )

"""Tool calls: what models write when they call a function, and how to make them do so.

For one chat request: `ToolUse.of(...)` says which tools the template gets, which form the output
must have and how to read it; a fresh parser a completion turns text, as it comes, into content and
calls. `find_format` chooses a model's way of writing calls by its chat template.
"""

from engine.tool_calls.formats import FORMATS, ToolCallFormat, find_format
from engine.tool_calls.parser import Parsed, ToolCallDelta, ToolCallParser
from engine.tool_calls.tools import Tool
from engine.tool_calls.use import ToolUse

__all__ = [
    "FORMATS",
    "Parsed",
    "Tool",
    "ToolCallDelta",
    "ToolCallFormat",
    "ToolCallParser",
    "ToolUse",
    "find_format",
]

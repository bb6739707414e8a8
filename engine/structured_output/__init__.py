"""Output that follows a grammar: JSON schemas, regular expressions, choices, grammars.

`spec` is what a caller asks for, `compiler` turns it into a matcher for the model's tokenizer,
`matcher` follows one request's output, `mask` forbids tokens on the device. Grammars are parsed and
matched by llguidance; nothing else here or elsewhere calls it.
"""

from engine.structured_output.spec import StructuredOutput

__all__ = ["StructuredOutput"]

"""From what a caller asks for to a matcher over the model's vocabulary."""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from engine.errors import RequestError
from engine.structured_output.matcher import GrammarMatcher
from engine.structured_output.spec import StructuredOutput

MAX_CACHED_GRAMMARS = 256
MAX_ERROR_CHARACTERS = 300

WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
"""What may stand between the parts of a JSON document: indented documents are fine, but a model
cannot fill its whole budget with blanks, as small ones do where nothing limits them."""

_WORD_BITS = 32
_EXCERPT = re.compile(r" *\d+ \| | *\^$")


class GrammarCompiler:
    """Makes matchers. Any thread may use it.

    The vocabulary is prepared at the first use, which takes up to a second; compiled grammars are
    kept, and copying one takes microseconds.

    Args:
        tokenizer: The model's, of transformers.
        vocab_size: Of the model's head, which may be larger than the tokenizer's.
        eos_token_ids: Tokens that end an output.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._compiled: OrderedDict[StructuredOutput, LLMatcher] = OrderedDict()

    def matcher(self, wanted: StructuredOutput) -> GrammarMatcher:
        """Return a matcher at the beginning of a grammar.

        Raises:
            RequestError: The schema, expression or grammar is invalid or too complex, or the
                model's tokenizer cannot be used.
        """
        with self._lock:
            compiled = self._compiled.get(wanted)
            if compiled is None:
                compiled = self._compile(wanted)
                self._compiled[wanted] = compiled
            self._compiled.move_to_end(wanted)
            if len(self._compiled) > MAX_CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
            assert self._vocabulary is not None
            num_words = -(-self._vocabulary.vocab_size // _WORD_BITS)
            return GrammarMatcher(compiled.deep_copy(), num_words * _WORD_BITS // 8)

    def _compile(self, wanted: StructuredOutput) -> LLMatcher:
        if self._vocabulary is None:
            self._vocabulary = self._make_vocabulary()
        try:
            matcher = LLMatcher(self._vocabulary, _grammar(wanted), log_level=0)
            message = matcher.get_error()
        except Exception as error:  # of what it cannot even read, such as very deep schemas
            message = str(error)
        if message:
            # Without the excerpt of the grammar, which may be none that the caller wrote.
            lines = [line for line in message.splitlines() if not _EXCERPT.match(line)]
            message = " ".join(" ".join(lines).split())[:MAX_ERROR_CHARACTERS]
            raise RequestError(f"{wanted.kind} cannot be used: {message}")
        return matcher

    def _make_vocabulary(self) -> LLTokenizer:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise RequestError(
                "structured output needs a tokenizer.json, and the model folder has none"
            )
        text, eos = backend.to_str(), self._eos_token_ids or None
        try:
            return LLTokenizer(
                text, n_vocab=max(self._vocab_size, len(self._tokenizer)), eos_token=eos
            )
        except Exception as error:  # whatever the Rust side makes of a tokenizer
            raise RequestError(
                f"structured output does not work with this model's tokenizer: {error}"
            ) from error


def _grammar(wanted: StructuredOutput) -> str:
    """Return llguidance's form of a grammar."""
    if wanted.json_object or wanted.json_schema is not None:
        schema = '{"type": "object"}' if wanted.json_object else str(wanted.json_schema)
        return LLMatcher.grammar_from_json_schema(
            schema, defaults={"whitespace_pattern": WHITESPACE}
        )
    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.choice is not None:
        options = " | ".join(json.dumps(option) for option in wanted.choice)
        # As a terminal, so that thousands of them are one automaton and not as many rules.
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {options}")
    return LLMatcher.grammar_from_lark(wanted.grammar or "")

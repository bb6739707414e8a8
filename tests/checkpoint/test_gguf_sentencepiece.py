"""SentencePiece tokenizers rebuilt from GGUF metadata against a slow merge loop."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from engine.structured_output import StructuredOutput
from engine.structured_output.compiler import GrammarCompiler

Rebuild = Callable[[dict[str, Any]], PreTrainedTokenizerBase]
SPM_PIECES = [
    ("\u2581the", -1.0),
    ("\u2581t", -2.0),
    ("he", -3.0),
    ("\u2581a", -4.0),
    ("in", -5.0),
    ("\u2581\u2581", -6.0),
    ("ing", -7.0),
    ("\u2581in", -8.0),
    ("er", -9.0),
    ("\u2581\u2581\u2581\u2581", -10.0),
    ("aa", -11.0),
    ("aaa", -12.5),
    ("aaaa", -12.0),
]
SPM_TEXTS = [
    "the thing in there",
    "  the  ringer",
    "aaaaaaa aaa aa a",
    "theing here  \n  in",
    "ünïcödé 👋 the",
    "a",
]


def spm_metadata(**extra: Any) -> dict[str, Any]:
    letters = [(letter, -100.0 - rank) for rank, letter in enumerate("\u2581abcdefghinrst")]
    byte_tokens = [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    special = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces = [*special, *byte_tokens, *SPM_PIECES, *letters]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    types += [TokenType.BYTE] * 256 + [TokenType.NORMAL] * (len(SPM_PIECES) + len(letters))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece for piece, _ in pieces],
        "tokenizer.ggml.scores": [score for _, score in pieces],
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in extra.items()},
    }


def slow_sentencepiece(text: str, metadata: dict[str, Any]) -> list[int]:
    """Merge the neighbours whose union scores best, the leftmost first; then bytes for the rest."""
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    parts = list(("\u2581" + text.replace(" ", "\u2581")) if text else "")
    while True:
        unions = [left + right for left, right in pairwise(parts)]
        known = [(-scores[union], at) for at, union in enumerate(unions) if union in ids]
        if not known:
            break
        _, at = min(known)
        parts[at : at + 2] = [unions[at]]
    encoded = []
    for part in parts:
        encoded += [ids[part]] if part in ids else [ids[f"<0x{b:02X}>"] for b in part.encode()]
    return encoded


def test_sentencepiece_gives_the_same_ids(rebuild: Rebuild) -> None:
    metadata = spm_metadata()
    rebuilt = rebuild(metadata)
    for text in SPM_TEXTS:
        ids = rebuilt(text)["input_ids"]
        assert ids == [1, *slow_sentencepiece(text, metadata)], text
        assert rebuilt.decode(ids, skip_special_tokens=True) == text


def test_sentencepiece_added_tokens(rebuild: Rebuild) -> None:
    ids = rebuild(spm_metadata())("<s>a</s>")["input_ids"]
    assert (ids[:2], ids[-1]) == ([1, 1], 2)


def test_sentencepiece_without_a_prefix_space(rebuild: Rebuild) -> None:
    rebuilt = rebuild(spm_metadata(add_space_prefix=False, add_bos_token=False))
    assert rebuilt.tokenize("the a") == ["t", "he", "\u2581a"]
    assert rebuilt.decode(rebuilt(" the a")["input_ids"]) == " the a"


def test_grammars_know_the_rebuilt_vocabulary(rebuild: Rebuild) -> None:
    rebuilt = rebuild(spm_metadata(add_space_prefix=False, add_bos_token=False))
    compiler = GrammarCompiler(rebuilt, len(rebuilt), {2})
    texts = ["the thing", "an ünïcödé ring"]
    for text in texts:
        matcher = compiler.matcher(StructuredOutput(choice=texts))
        for token_id in rebuilt(text)["input_ids"]:
            assert not matcher.is_finished
            matcher.accept(token_id)
        assert matcher.error is None
        assert matcher.is_finished
    matcher = compiler.matcher(StructuredOutput(choice=texts))
    matcher.accept(rebuilt("ring")["input_ids"][0])
    assert "structured output failed" in matcher.error

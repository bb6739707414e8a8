"""From GGUF metadata to a Hugging Face tokenizer.

The two kinds of vocabulary have files of their own; here is what they share: added tokens, special
tokens, BOS and EOS, the chat template.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer

from engine.checkpoint.gguf_byte_bpe import PRE_TOKENIZERS, byte_bpe_tokenizer
from engine.checkpoint.gguf_config import special_token_ids
from engine.checkpoint.gguf_file import GGUFFile
from engine.checkpoint.gguf_sentencepiece import sentencepiece_tokenizer
from engine.errors import CheckpointError

if TYPE_CHECKING:  # see `engine.checkpoint.checkpoint`
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class _Parts:
    """A bare tokenizer and what its kind does when the file does not say."""

    tokenizer: Tokenizer
    adds_bos: bool


def gguf_tokenizer(file: GGUFFile) -> "PreTrainedTokenizerFast":
    """Build the tokenizer that the file describes.

    Raises:
        CheckpointError: There is none, it is incomplete, or of an unsupported kind.
    """
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 (heavy)

    metadata = file.metadata
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise CheckpointError(f"{file.path} holds no tokenizer (tokenizer.ggml.tokens is missing)")
    types = metadata.get("tokenizer.ggml.token_type", [int(TokenType.NORMAL)] * len(tokens))
    if len(types) != len(tokens):
        raise CheckpointError(
            f"{file.path}: {len(tokens)} tokens, but {len(types)} token types: the file is broken"
        )
    special = _special_tokens(file, tokens)
    parts = _bare_tokenizer(file, tokens, types, special.get("unk_token") or tokens[0])
    _add_tokens(parts.tokenizer, tokens, types)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=parts.tokenizer,
        add_bos_token=metadata.get("tokenizer.ggml.add_bos_token", parts.adds_bos),
        add_eos_token=metadata.get("tokenizer.ggml.add_eos_token", False),
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _bare_tokenizer(file: GGUFFile, tokens: list[str], types: list[int], unknown: str) -> _Parts:
    metadata = file.metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "llama":
        add_space = metadata.get("tokenizer.ggml.add_space_prefix", True)
        scores = metadata.get("tokenizer.ggml.scores")
        if not isinstance(scores, list) or len(scores) != len(tokens):
            raise CheckpointError(f"{file.path}: tokenizer.ggml.scores is missing or incomplete")
        return _Parts(sentencepiece_tokenizer(tokens, types, scores, unknown, add_space), True)
    if kind != "gpt2":
        raise CheckpointError(
            f"{file.path}: tokenizer model {kind!r} is not supported; supported: gpt2, llama"
        )
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{file.path}: pre-tokenizer {pre!r} is not supported; "
            f"supported: {', '.join(PRE_TOKENIZERS)}"
        )
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.merges is missing")
    try:
        tokenizer = byte_bpe_tokenizer(tokens, types, merges, PRE_TOKENIZERS[pre])
    except ValueError as error:
        raise CheckpointError(f"{file.path}: the tokenizer is broken: {error}") from error
    return _Parts(tokenizer, PRE_TOKENIZERS[pre].adds_bos)


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Declare the tokens that are matched whole in the text; they keep their ids."""
    special = (int(TokenType.CONTROL), int(TokenType.UNKNOWN))
    user_defined = int(TokenType.USER_DEFINED)
    typed = list(zip(tokens, types, strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, t in typed if t in special]
    )
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False) for token, t in typed if t == user_defined]
    )


def _special_tokens(file: GGUFFile, tokens: list[str]) -> dict[str, str]:
    """The tokens with a role, by the names that transformers gives the roles."""
    ids = special_token_ids(file)
    if isinstance(unknown := file.metadata.get("tokenizer.ggml.unknown_token_id"), int):
        ids["unk_token_id"] = unknown
    return {
        name.removesuffix("_id"): tokens[token_id]
        for name, token_id in ids.items()
        if 0 <= token_id < len(tokens)
    }

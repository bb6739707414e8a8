"""Byte-level BPE vocabularies of GGUF files (`tokenizer.ggml.model` = gpt2).

A file names its pre-tokenizer instead of describing it; the names that the supported architectures
use are explained here. The expressions are those of the models' own tokenizer.json, so that the ids
equal Hugging Face's.
"""

from dataclasses import dataclass

from gguf import TokenType
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PUNCTUATION_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{PUNCTUATION_AND_SPACE}"
QWEN2 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{PUNCTUATION_AND_SPACE}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """How text is cut before merging, and the habits that come with it.

    Attributes:
        splits: Expressions applied one after the other; what matches and what lies between
            matches become pieces.
        nfc: Compose characters first.
        ignore_merges: A piece that is a token is taken whole.
        adds_bos: Encoding starts with BOS unless the file says otherwise.
    """

    splits: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


_LLAMA3 = PreTokenizer(splits=(LLAMA3,), ignore_merges=True, adds_bos=True)
_QWEN2 = PreTokenizer(splits=(QWEN2,), nfc=True)

PRE_TOKENIZERS = {
    # What llama.cpp does for files that name none.
    "default": PreTokenizer(
        splits=(r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    ),
    "gpt-2": PreTokenizer(splits=(GPT2,)),
    "smollm": PreTokenizer(splits=(r"\p{N}", GPT2)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": PreTokenizer(splits=(LLAMA3,), adds_bos=True),
    "tekken": PreTokenizer(splits=(TEKKEN,), ignore_merges=True, adds_bos=True),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def byte_bpe_tokenizer(
    tokens: list[str], types: list[int], merges: list[str], pre: PreTokenizer
) -> Tokenizer:
    """Build a byte-level BPE tokenizer without added tokens.

    Args:
        tokens: Each id's token in the byte alphabet.
        types: Each token's `gguf.TokenType`.
        merges: Pairs `left right`, best first.
        pre: How text is cut.

    Raises:
        ValueError: A merge is malformed or names an unknown token.
    """
    pairs = []
    for merge in merges:
        left, separator, right = merge.partition(" ")
        if not separator:
            raise ValueError(f"the merge {merge!r} is no pair")
        pairs.append((left, right))
    unused = int(TokenType.UNUSED)  # fillers that round up the vocabulary
    vocab = {
        token: token_id
        for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != unused
    }
    try:
        tokenizer = Tokenizer(BPE(vocab=vocab, merges=pairs, ignore_merges=pre.ignore_merges))
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(str(error)) from error
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *[pre_tokenizers.Split(Regex(split), behavior="isolated") for split in pre.splits],
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer

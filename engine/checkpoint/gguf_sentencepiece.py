"""SentencePiece BPE vocabularies of GGUF files (`tokenizer.ggml.model` = llama).

SentencePiece merges the neighbours whose union scores best; `tokenizers` wants the pairs spelled
out, best first. This is the form in which Llama 2 and Mistral ship their tokenizer.json.
"""

from gguf import TokenType
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE

SPACE = "\u2581"


def sentencepiece_tokenizer(
    tokens: list[str], types: list[int], scores: list[float], unknown: str, add_space_prefix: bool
) -> Tokenizer:
    """Build a SentencePiece BPE tokenizer with byte fallback, without added tokens.

    Args:
        tokens: Each id's token, spaces written as U+2581.
        types: Each token's `gguf.TokenType`.
        scores: Each token's score; higher merges first.
        unknown: The unknown token.
        add_space_prefix: Text is encoded as if a space stood before it.
    """
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    model = BPE(
        vocab=vocab,
        merges=_merges(vocab, types, scores),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = [normalizers.Prepend(SPACE)] if add_space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(content=" ", left=1)] if add_space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(vocab: dict[str, int], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, by the token's score, then by the parts' ids."""
    normal = int(TokenType.NORMAL)
    ranked = []
    for token, token_id in vocab.items():
        if types[token_id] != normal:
            continue
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[token_id], left, right, token[:cut], token[cut:]))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]

"""Tokenizers rebuilt from GGUF metadata against the ones they describe."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import TokenType
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import GPT2Tokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from engine.checkpoint.gguf_byte_bpe import PRE_TOKENIZERS
from engine.checkpoint.gguf_file import GGUFFile
from engine.checkpoint.gguf_tokenizer import gguf_tokenizer
from engine.errors import CheckpointError

TEXTS = [
    "The year 2024 had 366 days; it's 12345678 o'clock, WE'LL see.",
    "def f(x):\n    return x ** 2  # square\n\n\n\tprint(f(12))  ",
    "Grüße: naïve façade. Привет, мир 2023! 你好，世界 2024年。",  # noqa: RUF001
    "नमस्ते दुनिया १२३ مرحبا ١٢٣ 안녕하세요",
    "emoji 👋🏽 👨‍👩‍👧‍👦 🇩🇪 ½ ² e\u0301 \u00a0 \u200b\ufeff",
    "https://a.b/c?d=%20#e_f-g CamelCaseWord ALLCAPS snake_case $100.00 a/b/\n",
    "<|start|>user\nhi<|end|> <think> thought </think>",
    "  leading and trailing   \r\n\r\n",
    "",
]
WriteGguf = Callable[..., Path]
# A token for the embedding's rows; the tokenizer needs nothing else of the model.
EMBEDDING = {"token_embd.weight": np.zeros((2000, 1), np.float32)}


def train(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """A byte-level vocabulary of about a thousand tokens, learned from the texts."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def split(expression: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def bpe_metadata(tokenizer: Tokenizer, pre: str | None, **extra: Any) -> dict[str, Any]:
    """The tokenizer as GGUF metadata, with two control tokens and a user-defined one appended."""
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=lambda token: vocab[token])
    added = {"<|start|>": TokenType.CONTROL, "<|end|>": TokenType.CONTROL}
    added |= {"<think>": TokenType.USER_DEFINED, "[PAD]": TokenType.UNUSED}
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        **({"tokenizer.ggml.pre": pre} if pre else {}),
        "tokenizer.ggml.tokens": [*tokens, *added],
        "tokenizer.ggml.token_type": [int(TokenType.NORMAL)] * len(tokens)
        + [int(kind) for kind in added.values()],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
        **{f"tokenizer.ggml.{key}": value for key, value in extra.items()},
    }


@pytest.fixture
def rebuild(write_gguf: WriteGguf) -> Callable[[dict[str, Any]], PreTrainedTokenizerBase]:
    """Write metadata to a file and make a tokenizer of it."""

    def make(metadata: dict[str, Any]) -> PreTrainedTokenizerBase:
        return gguf_tokenizer(GGUFFile(write_gguf(None, metadata=metadata, tensors=EMBEDDING)))

    return make


Rebuild = Callable[[dict[str, Any]], PreTrainedTokenizerBase]


def reference(tokenizer: Tokenizer) -> Tokenizer:
    """The trained tokenizer with the added tokens of `bpe_metadata`."""
    tokenizer.add_special_tokens(["<|start|>", "<|end|>"])
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def qwen2() -> Tokenizer:
    """What transformers' own Qwen2 class makes of a trained vocabulary."""
    model = json.loads(train(split(GGUF_PRE_TOKENIZER_SPLITS["qwen2"])).to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return Qwen2Tokenizer(vocab=model["vocab"], merges=merges).backend_tokenizer


def gpt2() -> Tokenizer:
    """What transformers' own GPT-2 class makes of a trained vocabulary."""
    model = json.loads(train(pre_tokenizers.ByteLevel(add_prefix_space=False)).to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return GPT2Tokenizer(vocab=model["vocab"], merges=merges).backend_tokenizer


def smollm() -> Tokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return train(pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(False)]))


def llama3() -> Tokenizer:
    tokenizer = train(split(GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]))
    tokenizer.model.ignore_merges = True
    return tokenizer


def tekken() -> Tokenizer:
    tokenizer = train(split(GGUF_PRE_TOKENIZER_SPLITS["tekken"]))
    tokenizer.model.ignore_merges = True
    return tokenizer


@pytest.mark.parametrize(
    ("pre", "make"),
    [
        ("smollm", smollm),
        ("gpt-2", gpt2),
        ("qwen2", qwen2),
        ("llama-bpe", llama3),
        ("tekken", tekken),
    ],
)
def test_byte_bpe_gives_the_same_ids(
    rebuild: Rebuild, pre: str, make: Callable[[], Tokenizer]
) -> None:
    original = make()
    rebuilt = rebuild(bpe_metadata(original, pre, add_bos_token=False))
    expected = reference(original)
    for text in TEXTS:
        ids = rebuilt(text)["input_ids"]
        assert ids == expected.encode(text, add_special_tokens=False).ids, text
        decoded = rebuilt.decode(ids)
        assert decoded == (expected.normalizer.normalize_str(text) if pre == "qwen2" else text)


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_round_trips(rebuild: Rebuild, pre: str) -> None:
    rebuilt = rebuild(bpe_metadata(smollm(), pre, add_bos_token=False))
    for text in TEXTS:
        if not PRE_TOKENIZERS[pre].nfc or "e\u0301" not in text:
            assert rebuilt.decode(rebuilt(text)["input_ids"]) == text


def test_default_pre_tokenizer_cuts_digits_in_threes(rebuild: Rebuild) -> None:
    rebuilt = rebuild(bpe_metadata(smollm(), None))
    pieces = rebuilt.backend_tokenizer.pre_tokenizer.pre_tokenize_str("it's 12345, $6!")
    assert [piece for piece, _ in pieces] == [
        "it",
        "'",
        "s",
        "Ġ",
        "123",
        "45",
        ",",
        "Ġ",
        "$",
        "6",
        "!",
    ]


@pytest.mark.parametrize(
    ("pre", "flags", "expected"),
    [
        ("llama-bpe", {}, ["<|start|>", "hi"]),
        ("llama-bpe", {"add_bos_token": False}, ["hi"]),
        ("smollm", {}, ["hi"]),
        ("smollm", {"add_bos_token": True}, ["<|start|>", "hi"]),
        ("qwen2", {"add_eos_token": True}, ["hi", "<|end|>"]),
    ],
)
def test_bos_and_eos(
    rebuild: Rebuild, pre: str, flags: dict[str, Any], expected: list[str]
) -> None:
    rebuilt = rebuild(bpe_metadata(smollm(), pre, **flags))
    assert rebuilt.convert_ids_to_tokens(rebuilt("hi")["input_ids"]) == expected


def test_added_and_unused_tokens(rebuild: Rebuild) -> None:
    rebuilt = rebuild(bpe_metadata(smollm(), "smollm"))
    ids = rebuilt("<|start|>a<think>")["input_ids"]
    assert rebuilt.convert_ids_to_tokens(ids) == ["<|start|>", "a", "<think>"]
    assert rebuilt.decode(ids, skip_special_tokens=True) == "a<think>"
    assert "[PAD]" not in rebuilt.get_vocab()


def test_chat_template(rebuild: Rebuild) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    metadata = bpe_metadata(smollm(), "smollm") | {"tokenizer.chat_template": template}
    text = rebuild(metadata).apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )
    assert text == "user: hi\n"


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
    "th<s>in</s>g",
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
        if "<s>" not in text:
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert' is not supported; supported: gpt2, llama"),
        ({"tokenizer.ggml.pre": "viking"}, "'viking' is not supported; supported: .*smollm.*qwen2"),
        ({"tokenizer.ggml.token_type": [1]}, "but 1 token types"),
        ({"tokenizer.ggml.merges": ["ab"]}, "the merge 'ab' is no pair"),
        ({"tokenizer.ggml.merges": ["a ✓"]}, "the tokenizer is broken"),
        ({"tokenizer.ggml.merges": "none"}, "merges is missing"),
        ({"tokenizer.ggml.model": "llama"}, "scores is missing"),
        ({"tokenizer.ggml.tokens": "none"}, "holds no tokenizer"),
    ],
)
def test_unusable_metadata(rebuild: Rebuild, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        rebuild(bpe_metadata(smollm(), "smollm") | changes)

"""Byte-level BPE tokenizers rebuilt from GGUF metadata against the ones they describe."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from gguf import TokenType
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import GPT2Tokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from engine.checkpoint.gguf_byte_bpe import PRE_TOKENIZERS
from engine.errors import CheckpointError

TEXTS = [
    "The year 2024 had 366 days; it's 12345678 o'clock, WE'LL see.",
    "def f(x):\n    return x ** 2  # square\n\n\n\tprint(f(12))  ",
    "Grüße: naïve façade. Привет, мир 2023! 你好，世界 2024年。",
    "नमस्ते दुनिया १२३ مرحبا ١٢٣ 안녕하세요",
    "emoji 👋🏽 👨‍👩‍👧‍👦 🇩🇪 ½ ² e\u0301 \u00a0 \u200b\ufeff",
    "https://a.b/c?d=%20#e_f-g CamelCaseWord ALLCAPS snake_case $100.00 a/b/\n",
    "<|start|>user\nhi<|end|> <think> thought </think>",
    "  leading and trailing   \r\n\r\n",
    "",
]
Rebuild = Callable[[dict[str, Any]], PreTrainedTokenizerBase]


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

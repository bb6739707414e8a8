"""The default model's tokenizer against a slow byte-level BPE written from its definition."""

from functools import cache
from itertools import pairwise

import pytest
import regex
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from engine.checkpoint import Checkpoint, open_checkpoint
from engine.checkpoint.default_model import default_model_gguf
from engine.checkpoint.gguf_file import GGUFFile

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEXTS = [
    "Hello, world!",
    "It's the dog's bone; they've said we'll see, I'd say.",
    "The year 2024 had 366 days, 8784 hours and 3.1622e7 seconds.",
    "12345678901234567890",
    "a1b22c333 v1.2.3-rc4 0x1F 1,000,000",
    "def f(x: int) -> int:\n    return x ** 2  # square\n\n\tprint(f(12))\n",
    "for (int i = 0; i < 10; ++i) { a[i] += b[i] * 0.5f; }",
    '{"key": [1, 2, {"nested": null}], "text": "\\u00e9"}',
    "   leading, double  spaces and trailing   ",
    "\n\n\nlines\r\n\r\nand\ttabs\t\t\n ",
    "Grüße aus Köln: naïve façade, coöperate, Ærøskøbing",
    "Привет, как дела? Всё хорошо в 2023 году.",
    "你好，世界！今天是2024年1月1日。",
    "こんにちは世界、カタカナも漢字も１２３も。",
    "안녕하세요 세계 123",
    "مرحبا بالعالم ١٢٣ كيف الحال؟",
    "नमस्ते दुनिया १२३",
    "שלום עולם",
    "emoji 👋🏽 👨‍👩‍👧‍👦 🇩🇪 🚀🚀 ✅",
    "∑∫√π ≈ 3.14159 ½ ² ① Ⅷ",
    "e\u0301 combining, \u200b zero width, \u00a0 no-break, \ufeff mark",
    "https://example.org/a?b=c&d=%20#e_f-g user@example.org",
    "ALLCAPS MixedCase snake_case kebab-case camelCase123",
    "",
    " ",
    "x" * 300,
]


@pytest.fixture(scope="module")
def tokenizer(default_checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    return default_checkpoint.load_tokenizer()


@cache
def vocabulary() -> tuple[dict[str, int], dict[tuple[str, ...], int]]:
    metadata = GGUFFile(default_model_gguf()).metadata
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    return {token: token_id for token_id, token in enumerate(tokens)}, ranks


def byte_letters() -> list[str]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others follow after 255."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def slow_encode(text: str) -> list[int]:
    vocab, ranks = vocabulary()
    letters = byte_letters()
    ids = []
    for piece in regex.findall(r"\p{N}|\P{N}+", text):
        for word in regex.findall(GPT2_WORDS, piece):
            parts = [letters[byte] for byte in word.encode()]
            while len(parts) > 1:
                pairs = list(pairwise(parts))
                best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
                if best not in ranks:
                    break
                at = pairs.index(best)
                parts[at : at + 2] = ["".join(best)]
            ids += [vocab[part] for part in parts]
    return ids


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_exact(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer(text)["input_ids"] == slow_encode(text)


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_known_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer("Hello 123")["input_ids"] == [19556, 216, 33, 34, 35]
    assert tokenizer.tokenize("in 2024!") == ["in", "Ġ", "2", "0", "2", "4", "!"]


def test_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<|im_end|>", "<|endoftext|>")
    ids = tokenizer("<|im_start|>user\nhi<|im_end|>")["input_ids"]
    assert (ids[0], ids[-1], len(ids)) == (1, 2, 5)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi"
    assert len(tokenizer) == 49152


def test_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    question = {"role": "user", "content": "Hi there"}
    text = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi there<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    system = {"role": "system", "content": "Be brief."}
    answer = {"role": "assistant", "content": "Hello"}
    text = tokenizer.apply_chat_template([system, question, answer], tokenize=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi there<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n"
    )


def test_other_ways_to_load_it_agree(
    default_checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase
) -> None:
    direct = open_checkpoint(None, load_format="gguf").load_tokenizer()
    auto = AutoTokenizer.from_pretrained(default_checkpoint.path)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert direct(text)["input_ids"] == ids
        assert auto(text)["input_ids"] == ids
    assert direct.chat_template == tokenizer.chat_template == auto.chat_template

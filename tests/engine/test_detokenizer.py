"""Pieces of text: together they are the whole, none is half a character or half a stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoint import open_checkpoint
from engine.detokenizer import MAX_INCOMPLETE_BYTES, MAX_WINDOW_TOKENS, IncrementalDetokenizer

REPLACEMENT = "\ufffd"
TEXTS = [
    "The quick brown fox, 12.5% of it; naïve café.",
    "😀😃 family: 👨‍👩‍👧‍👦 flag: 🇫🇷 skin: 👍🏽 heart: ❤️",
    "今天天气很好，我们去公园。これは日本語の文章です。한국어도",
    "e\u0301 a\u0308\u0323 combining: Z\u0351\u036b\u0343",
    "नमस्ते दुनिया, क्षत्रिय",
    "مرحبا بالعالم ‏ שלום",
    "tabs\tand\n\nnewlines\r\n  leading   spaces ",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𓀀𓀁 🀄",
    f"a real {REPLACEMENT} in the middle",
    "",
]
TOGETHER = settings(max_examples=150, deadline=None)


@pytest.fixture(scope="module")
def tokenizer(default_model_folder):
    return open_checkpoint(None).load_tokenizer()


@pytest.fixture(scope="module")
def byte_ids(tokenizer) -> list[int]:
    """Tokens of single bytes; byte-level BPE writes each byte as one printable character."""
    vocab = tokenizer.get_vocab()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable}
    names |= {byte: chr(256 + n) for n, byte in enumerate(others)}
    # SmolLM2 has no token for bytes that never occur in UTF-8.
    return [vocab.get(names[byte], vocab[names[0x80]]) for byte in range(256)]


def decode(tokenizer, token_ids: list[int]) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def without_incomplete_end(text: str) -> str:
    """Return a text without the replacement characters that may stand for half a character."""
    return text[: max(len(text.rstrip(REPLACEMENT)), len(text) - MAX_INCOMPLETE_BYTES)]


def stream(tokenizer, token_ids: list[int], **options) -> tuple[list[str], IncrementalDetokenizer]:
    """Feed tokens until the end or a stop string; each piece must be just what `text` grew by."""
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    pieces = []
    for token_id in token_ids:
        before = detokenizer.text
        pieces.append(detokenizer.append(token_id))
        assert detokenizer.text == before + pieces[-1]
        if detokenizer.stop_string is not None:
            return pieces, detokenizer
    pieces.append(detokenizer.finish())
    assert detokenizer.text == "".join(pieces)
    return pieces, detokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_text(tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text)
    pieces, _ = stream(tokenizer, token_ids)
    assert "".join(pieces) == decode(tokenizer, token_ids) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS[:8])
def test_bytes_one_by_one_make_whole_characters(tokenizer, byte_ids, text: str) -> None:
    token_ids = [byte_ids[byte] for byte in text.encode()]
    pieces, _ = stream(tokenizer, token_ids)
    assert "".join(pieces) == decode(tokenizer, token_ids) == text


def test_a_character_waits_for_its_last_byte(tokenizer, byte_ids) -> None:
    token_ids = [byte_ids[byte] for byte in "aé😀".encode()]
    pieces, _ = stream(tokenizer, token_ids)
    assert pieces == ["a", "", "é", "", "", "", "😀", ""]


@pytest.mark.parametrize("num_bytes", [1, 2, 3])
def test_half_a_character_at_the_end_is_left_out(tokenizer, byte_ids, num_bytes: int) -> None:
    token_ids = [byte_ids[byte] for byte in b"ok " + "😀".encode()[:num_bytes]]
    pieces, _ = stream(tokenizer, token_ids)
    assert "".join(pieces) == "ok "


def test_invalid_bytes_become_replacement_characters(tokenizer, byte_ids) -> None:
    token_ids = [byte_ids[0x80]] * 100 + [byte_ids[ord("x")]]
    pieces, _ = stream(tokenizer, token_ids)
    assert "".join(pieces) == REPLACEMENT * 100 + "x"
    assert sum(map(bool, pieces[:100])) > 90, "they should not all wait for the end"


def test_text_that_never_comes_to_a_clean_end(tokenizer, byte_ids) -> None:
    """Every token ends with the first bytes of the next character; none of them may be lost."""

    class TwoTokens:
        """Decodes pairs of SmolLM2 byte tokens."""

        def decode(self, token_ids, **options):
            return decode(tokenizer, [byte for pair in token_ids for byte in pair])

    emoji = [byte_ids[byte] for byte in "😀".encode()]
    rotated = (*emoji[1:], emoji[0])
    num_tokens = 4 * MAX_WINDOW_TOKENS
    detokenizer = IncrementalDetokenizer(TwoTokens())
    pieces = [detokenizer.append((emoji[0],))]
    pieces += [detokenizer.append(rotated) for _ in range(num_tokens)]
    assert pieces == ["", *["😀"] * num_tokens]
    assert detokenizer.finish() == ""


@TOGETHER
@given(data=st.data())
def test_random_tokens(tokenizer, byte_ids, data) -> None:
    one = st.integers(0, len(tokenizer) - 1) | st.sampled_from(byte_ids)
    token_ids = data.draw(st.lists(one, max_size=3 * MAX_WINDOW_TOKENS))
    pieces, _ = stream(tokenizer, token_ids)
    assert "".join(pieces) == without_incomplete_end(decode(tokenizer, token_ids))


@TOGETHER
@given(data=st.data())
def test_random_tokens_with_stop_strings(tokenizer, byte_ids, data) -> None:
    """As if the whole text had been searched after every token."""
    letters = [byte_ids[ord(letter)] for letter in "aabbc "]
    token_ids = data.draw(st.lists(st.sampled_from(letters) | st.integers(0, 400), max_size=60))
    stops = data.draw(st.lists(st.text("abc ", min_size=1, max_size=5), min_size=1, max_size=4))
    include = data.draw(st.booleans())
    pieces, detokenizer = stream(tokenizer, token_ids, stop=stops, include_stop_str=include)
    whole = without_incomplete_end(decode(tokenizer, token_ids))
    shown = "".join(pieces)
    if detokenizer.stop_string is None:
        assert shown == whole
        assert not any(stop in whole for stop in stops)
        return
    stop = detokenizer.stop_string
    text = shown.removesuffix(stop) if include else shown
    assert whole.startswith(text + stop)
    assert not any(other in text for other in stops)


def spell(byte_ids, text: str) -> list[int]:
    return [byte_ids[byte] for byte in text.encode()]


@pytest.mark.parametrize(
    ("text", "stops", "shown", "stop"),
    [
        ("one END two", ["END"], "one ", "END"),
        ("one EN two", ["END"], "one EN two", None),
        ("aaab", ["aab"], "a", "aab"),
        ("xaby", ["b", "ab"], "x", "ab"),
        ("xabcy", ["bc", "abc"], "x", "abc"),
        ("ababac", ["abac"], "ab", "abac"),
        ("say 😀 now", ["😀"], "say ", "😀"),
        ("END", ["END"], "", "END"),
        ("\n\nUser: hi", ["\nUser:", "\n\n\n"], "\n", "\nUser:"),
    ],
)
@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_across_tokens(tokenizer, byte_ids, text, stops, shown, stop, include) -> None:
    pieces, detokenizer = stream(
        tokenizer, spell(byte_ids, text), stop=stops, include_stop_str=include
    )
    assert detokenizer.stop_string == stop
    assert "".join(pieces) == shown + (stop or "" if include else "")
    assert detokenizer.append(byte_ids[ord("x")]) == "" or stop is None


def test_one_token_may_hold_text_stop_and_more(tokenizer) -> None:
    [token_id] = tokenizer.encode(" the")
    pieces, detokenizer = stream(tokenizer, [token_id, token_id], stop=["h"])
    assert pieces == [" t"]
    assert detokenizer.stop_string == "h"


def test_what_may_become_a_stop_string_waits(tokenizer, byte_ids) -> None:
    pieces, _ = stream(tokenizer, spell(byte_ids, "a<|b<|e"), stop=["<|end|>"])
    assert pieces == ["a", "", "", "<|b", "", "", "", "<|e"]


@pytest.mark.parametrize(
    ("min_tokens", "shown"),
    [(0, ""), (3, ""), (4, "END"), (5, "END"), (6, "END"), (7, "ENDEND"), (10, "ENDENDENDx")],
)
def test_stop_strings_count_from_min_tokens_on(tokenizer, byte_ids, min_tokens, shown) -> None:
    pieces, _ = stream(
        tokenizer, spell(byte_ids, "ENDENDENDx"), stop=["END"], min_tokens=min_tokens
    )
    assert "".join(pieces) == shown


def test_a_stop_string_may_begin_before_min_tokens(tokenizer, byte_ids) -> None:
    pieces, detokenizer = stream(tokenizer, spell(byte_ids, "xENDy"), stop=["END"], min_tokens=4)
    assert "".join(pieces) == "x"
    assert detokenizer.stop_string == "END"


def test_special_tokens_are_left_out_or_kept(tokenizer) -> None:
    token_ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|> there")
    assert "".join(stream(tokenizer, token_ids)[0]) == "user\nhi there"
    pieces, _ = stream(tokenizer, token_ids, skip_special_tokens=False)
    assert "".join(pieces) == "<|im_start|>user\nhi<|im_end|> there"

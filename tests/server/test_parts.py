"""Parts of the server that need neither an engine nor a socket."""

import asyncio
import logging

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from engine.server.generation import ClientGoneError, Generation
from engine.server.histogram import Histogram, one_two_five
from engine.server.json_text import to_json
from engine.server.logs import JsonFormatter, TextFormatter
from engine.server.recent import Recent
from engine.server.token_texts import TokenTexts
from engine.server.wire import Finish, TokenDelta
from engine.token_logprobs import TokenLogprobs

END = Finish("stop", None, None)


def delta(text: str, *token_ids: int, finish: Finish | None = None) -> TokenDelta:
    logprobs = [TokenLogprobs(token_id, -1.0, 1, ()) for token_id in token_ids]
    return TokenDelta("id", text, list(token_ids), logprobs, finish)


def test_deltas_that_nobody_took_are_merged() -> None:
    async def scenario() -> None:
        generation = Generation(["a", "b"])
        generation.put(0, delta("x", 1))
        generation.put(1, delta("y", 2))
        generation.put(0, delta("z", 3, 4, finish=END))
        first, second = await generation.take()
        assert (first.index, first.text, first.token_ids, first.finish) == (0, "xz", [1, 3, 4], END)
        assert [entry.token_id for entry in first.logprobs] == [1, 3, 4]
        assert (second.index, second.text, second.finish) == (1, "y", None)
        taking = asyncio.ensure_future(generation.take())
        await asyncio.sleep(0)
        assert not taking.done()
        generation.put(1, delta("!", 5, finish=END))
        assert [item.text for item in await taking] == ["!"]
        assert await generation.take() == []
        assert generation.num_output_tokens == 5

    asyncio.run(scenario())


def test_the_whole_is_woken_for_once_and_in_order() -> None:
    async def scenario() -> None:
        generation = Generation(["a", "b"])
        taking = asyncio.ensure_future(generation.take_whole())
        await asyncio.sleep(0)
        generation.put(1, delta("b", 1, finish=END))
        await asyncio.sleep(0)
        assert not taking.done()
        generation.put(0, delta("a", 2, finish=END))
        assert [choice.text for choice in await taking] == ["a", "b"]

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["take", "take_whole"])
def test_errors_reach_whoever_takes_and_the_first_one_counts(name: str) -> None:
    async def scenario() -> None:
        generation = Generation(["a"])
        taking = asyncio.ensure_future(getattr(generation, name)())
        await asyncio.sleep(0)
        generation.fail(ClientGoneError())
        generation.fail(ValueError())
        with pytest.raises(ClientGoneError):
            await taking
        with pytest.raises(ClientGoneError):
            await getattr(generation, name)()

    asyncio.run(scenario())


def test_histograms_count_as_prometheus_wants_it() -> None:
    histogram = Histogram((1, 2.5, 5))
    for value in (0, 1, 1.1, 5, 9):
        histogram.observe(value)
    assert histogram.cumulative() == [("1.0", 2), ("2.5", 3), ("5.0", 4), ("+Inf", 5)]
    assert histogram.total == pytest.approx(16.1)
    assert one_two_five(60) == (1, 2, 5, 10, 20, 50)


def test_recent_values_forget_what_is_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    recent = Recent()
    now = 1000.0
    monkeypatch.setattr("engine.server.recent.time.monotonic", lambda: now)
    assert recent.ttft_percentiles_s() is None
    for second in range(100):
        recent.add_tokens(900.0 + second, 5)
        recent.add_finish(900.0 + second)
        recent.add_ttft(900.0 + second, float(second))
    assert recent.tokens_per_s() == 5
    assert recent.finished_per_s() == 1
    assert recent.ttft_percentiles_s() == {"p50": 85.0, "p90": 97.0, "p99": 99.0}


def test_json_never_fails_on_text() -> None:
    assert to_json({"text": "\ud800 日本"}) == '{"text":"? 日本"}'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"value": float("nan")})


def test_log_lines_have_the_fields_that_were_given() -> None:
    record = logging.makeLogRecord({"msg": "request", "levelname": "INFO", "status": 200})
    assert TextFormatter().format(record).endswith("info request status=200")
    assert '"message": "request", "status": 200' in JsonFormatter().format(record)


def tokenizer_of(pieces: list[str], decoder) -> PreTrainedTokenizerFast:
    model = models.BPE({piece: at for at, piece in enumerate(pieces)}, [])
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_tokens_of_sentencepiece_models_keep_their_leading_blank() -> None:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strips = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    texts = TokenTexts(tokenizer_of(["a", "▁Paris", "<0xE6>", "日"], strips))
    assert [texts.text(token_id) for token_id in (0, 1, 3)] == ["a", " Paris", "日"]
    assert texts.utf8(1) == list(b" Paris")
    assert texts.utf8(2) == [0xE6]


def test_half_characters_of_byte_level_models_are_told_as_bytes() -> None:
    texts = TokenTexts(tokenizer_of(["a", "Ġb", "æ", "Ĺ¥"], decoders.ByteLevel()))
    assert texts.text(1) == " b"
    assert texts.text(2) == "\ufffd"
    assert bytes(texts.utf8(2) + texts.utf8(3)).decode() == "日"

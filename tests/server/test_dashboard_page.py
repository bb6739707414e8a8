"""The page at `/` in a real browser: numbers, timeline, prompt box, themes, keys, restarts."""

import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright")

from playwright.sync_api import Browser, Page, expect

from tests.server.browser import NEEDS_BROWSER, TIMEOUT_MS, chromium, open_page
from tests.server.running_server import RunningServer

pytestmark = [*NEEDS_BROWSER, pytest.mark.ispc]
expect.set_options(timeout=TIMEOUT_MS)

DESKTOP, PHONE = {"width": 1280, "height": 1000}, {"width": 390, "height": 844}
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, smollm2_server: RunningServer) -> Iterator[Page]:
    with open_page(browser, smollm2_server.url, viewport=DESKTOP) as page:
        expect(page.locator("#state")).to_have_text("Ready")
        yield page


def send(page: Page, prompt: str, *, kind: str = "Chat", max_tokens: int = 40) -> None:
    page.get_by_role("textbox", name="Prompt").fill(prompt)
    page.locator("label", has_text=kind).click()
    page.get_by_role("spinbutton", name="Most tokens").fill(str(max_tokens))
    page.get_by_role("spinbutton", name="Temperature").fill("0")
    page.get_by_role("button", name="Send").click()


def test_the_prompt_box_streams_what_the_api_answers(page: Page, smollm2_server) -> None:
    page.evaluate(
        """() => {
          window.lengths = [];
          const answer = document.getElementById("answer");
          new MutationObserver(() => window.lengths.push(answer.textContent.length))
            .observe(answer, { characterData: true, childList: true, subtree: true });
        }"""
    )
    send(page, QUESTION)
    note = page.locator("#answer-note")
    expect(note).to_contain_text("ended by stop")
    expect(page.locator("#answer")).to_have_text("The capital of France is Paris.")
    assert re.search(r"^\d+ tokens.*first text after [\d.]+ m?s", note.text_content())
    lengths = page.evaluate("window.lengths")
    assert len(set(lengths)) > 3  # it came in pieces
    assert lengths == sorted(lengths)
    expect(page.get_by_role("button", name="Send")).to_be_enabled()

    text = "def add(a, b):"
    send(page, text, kind="Raw text", max_tokens=20)
    expect(note).to_contain_text("ended by length")
    body = {"prompt": text, "max_tokens": 20, "temperature": 0}
    _, answer = smollm2_server.post("/v1/completions", body)
    assert page.locator("#answer").text_content() == answer["choices"][0]["text"]


def test_a_running_answer_can_be_stopped(page: Page, smollm2_server) -> None:
    send(page, "Count from one to a thousand, in words.", max_tokens=900)
    expect(page.locator("#answer")).to_contain_text(re.compile(r"\S+"))
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.locator("#answer-note")).to_contain_text("Stopped.")
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_hidden()
    deadline = time.monotonic() + TIMEOUT_MS / 1000
    while smollm2_server.get("/dashboard/state")[1]["gauges"]["num_device_used"]:
        assert time.monotonic() < deadline, "the stopped request keeps its blocks"
    expect(page.locator("#running")).to_have_text("0")


def test_an_error_is_shown_as_the_server_words_it(page: Page) -> None:
    send(page, "word " * 1500)
    expect(page.locator("#answer-note")).to_contain_text("Status 400: the prompt has")
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def test_text_of_the_model_is_text(page: Page) -> None:
    """Markup is shown, not obeyed: in the answer, and in what the server tells of itself."""
    page.route("**/v1/completions", lambda route: route.fulfill(
        content_type="text/event-stream",
        body="data: " + json.dumps({"choices": [{"text": "<img src=x onerror=1><b>bold</b>",
                                                 "finish_reason": "stop"}]})
        + "\n\ndata: [DONE]\n\n"))  # fmt: skip
    send(page, "x", kind="Raw text")
    expect(page.locator("#answer")).to_have_text("<img src=x onerror=1><b>bold</b>")
    assert page.locator("#answer *").count() == 0


def test_a_broken_stream_is_no_complete_answer(page: Page) -> None:
    page.route("**/v1/completions", lambda route: route.fulfill(
        content_type="text/event-stream",
        body='data: {"choices": [{"text": "half"}]}\n\n'))  # fmt: skip
    send(page, "x", kind="Raw text")
    expect(page.locator("#answer-note")).to_contain_text("broke before the answer was complete")
    expect(page.locator("#answer")).to_have_text("half")


def test_the_timeline_is_read_with_keys_and_pointer(
    page: Page, smollm2_server: RunningServer
) -> None:
    _, state = smollm2_server.get("/dashboard/state")
    earlier = state["steps"][-1]["number"] if state["steps"] else 0
    send(page, QUESTION)
    expect(page.locator("#answer-note")).to_contain_text("ended by stop")
    timeline = page.get_by_role("slider", name="Steps")
    expect(page.locator("#no-steps")).to_be_hidden()
    # One prompt and seven decode steps; on a slow machine the page hears of them later.
    page.wait_for_function(
        "([slider, number]) => Number(slider.getAttribute('aria-valuenow')) >= number",
        arg=[timeline.element_handle(), earlier + 6],
    )
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("button", name="Go on")).to_have_attribute("aria-pressed", "true")
    newest = int(timeline.get_attribute("aria-valuenow"))
    timeline.press("ArrowLeft")
    timeline.press("ArrowLeft")
    assert int(timeline.get_attribute("aria-valuenow")) == newest - 2
    expect(page.locator("#d-step")).to_contain_text(f"{newest - 2:,}, took")
    expect(page.locator("#d-rows")).to_have_text("1 device decode")
    expect(page.locator("#d-mode")).to_contain_text("GPU only")
    assert "1 device decode" in timeline.get_attribute("aria-valuetext")
    timeline.press("Home")
    expect(page.locator("#d-rows")).to_contain_text("prompt token")
    timeline.press("Escape")
    expect(page.locator("#d-step")).to_contain_text("the newest")
    page.locator("label", has_text="60 s").click()
    box = timeline.bounding_box()
    page.mouse.move(box["x"] + 2, box["y"] + 60)
    hovered = page.locator("#d-step").text_content()
    assert "the newest" not in hovered
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 60)
    assert page.locator("#d-step").text_content() != hovered


def test_numbers_follow_the_server(page: Page, smollm2_server) -> None:
    send(page, QUESTION)
    expect(page.locator("#answer-note")).to_contain_text("ended by stop")
    for tile in ("#ttft", "#tpot"):
        expect(page.locator(tile)).to_contain_text(re.compile(r"\d m?s"))
    expect(page.locator("#model")).to_have_text(smollm2_server.model)
    expect(page.locator("#modes-legend")).to_contain_text(re.compile(r"GPU only 100 % \(\d+\)"))
    expect(page.locator("#kv-device-text")).to_contain_text(re.compile(r"of [\d,]+ blocks"))
    expect(page.locator("#kv-host-text")).to_have_text("offloading is off")
    page.wait_for_function(
        """() => document.querySelector("#rate-spark .curve").getAttribute("d").length > 10"""
    )
    _, state = smollm2_server.get("/dashboard/state")
    shown = f"{state['totals']['generation_tokens']:,} generated tokens"
    expect(page.locator("#totals")).to_contain_text(shown)


def test_only_its_own_code_may_run(browser: Browser, smollm2_server) -> None:
    with open_page(browser, smollm2_server.url, provoked="Content Security Policy") as page:
        policy = page.request.get(smollm2_server.url).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert not re.search(r"https?:|\*", policy)
        intruder = """() => {
          const script = document.createElement("script");
          script.textContent = "window.intruder = true";
          document.body.append(script);
          return window.intruder === undefined;
        }"""
        assert page.evaluate(intruder)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_fits_and_is_legible(
    browser: Browser, smollm2_server, tmp_path: Path, theme: str, size
) -> None:
    options = {"viewport": size, "color_scheme": theme}
    with open_page(browser, smollm2_server.url, **options) as page:
        expect(page.locator("#state")).to_have_text("Ready")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= size["width"], "it scrolls sideways"
        assert page.evaluate(UNLABELLED) == []
        colors = page.evaluate(COLORS)
        for front, back, least in LEGIBLE:
            ratio = contrast(colors[front], colors[back])
            assert ratio >= least, (front, back, ratio)
        picture = tmp_path / "page.png"
        page.screenshot(path=picture, full_page=True)
        assert picture.stat().st_size > 20_000
        # The other theme, by hand; it stays with the next visit.
        other = {"light": "dark", "dark": "light"}[theme]
        while page.locator("#theme-button").text_content() != f"Theme: {other}":
            page.locator("#theme-button").click()
        assert page.evaluate(COLORS)["page"] != colors["page"]
        page.reload()
        expect(page.locator("#theme-button")).to_have_text(f"Theme: {other}")
        assert page.evaluate(COLORS)["page"] != colors["page"]


UNLABELLED = """() => [...document.querySelectorAll("input, textarea, button, [role=slider]")]
  .filter((node) => !(node.labels && node.labels.length) && !node.textContent.trim()
    && !node.hasAttribute("aria-label") && !node.hasAttribute("aria-labelledby"))
  .map((node) => node.outerHTML)"""
COLORS = """() => {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(["page", "surface", "raised", "text", "muted", "action", "on-action",
    "device", "cpu", "bad", "idle", "gpu-only", "asymmetric", "overlap"].map(
    (name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}"""
# Web Content Accessibility Guidelines 2.2: 4.5 for text (1.4.3), 3 for graphics (1.4.11).
LEGIBLE = [
    *[(text, back, 4.5) for text in ("text", "muted") for back in ("page", "surface", "raised")],
    ("on-action", "action", 4.5),
    ("bad", "surface", 4.5),
    *[(mark, "idle", 3.0) for mark in ("device", "cpu", "gpu-only", "asymmetric", "overlap")],
]


def contrast(one: str, other: str) -> float:
    def luminance(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_key_draining_and_restart(browser: Browser, serve) -> None:
    """One visit that sees a server with a key, its end, and the server that comes after it."""
    options = ["--api-key", "secret", "--device-kv-blocks", 20, "--host-kv-gb", 0.05]
    offloading = ["--mode", "asymmetric", "--shutdown-timeout", 300, "--max-num-seqs", 8]
    server = serve(*options, *offloading).wait_ready()
    with open_page(browser, server.url, viewport=DESKTOP) as page:
        state = page.locator("#state")
        expect(state).to_have_text("API key needed")
        expect(page.locator("#banner")).to_have_text("This server asks for an API key.")
        for key, answer in (("wrong", "API key needed"), ("secret", "Ready")):
            page.locator("#key").fill(key)
            page.get_by_role("button", name="Use key").click()
            expect(state).to_have_text(answer)
            if key == "wrong":
                expect(page.locator("#banner")).to_contain_text("does not know this API key")
        expect(page.locator("#key-form")).to_be_hidden()

        body = {"prompt": "x " * 40, "n": 8, "max_tokens": 60, "ignore_eos": True}
        server.post("/v1/completions", body, authorization="Bearer secret")
        expect(page.locator("#modes-legend")).to_contain_text("asymmetric")
        expect(page.locator("#kv-host-text")).to_contain_text("blocks")
        expect(page.locator("#busy")).to_contain_text("CPU attention")
        timeline = page.get_by_role("slider", name="Steps")
        first = int(timeline.get_attribute("aria-valuemax"))
        assert first > 8
        seen = set()
        for _ in range(first):  # some step among them used the CPU
            timeline.press("ArrowLeft")
            seen.add("at work" in page.locator("#d-cpu").text_content())
        assert True in seen

        page.get_by_role("textbox", name="Prompt").fill("x")
        page.locator("label", has_text="Raw text").click()
        page.get_by_role("spinbutton", name="Most tokens").fill("400")
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#answer")).to_contain_text(re.compile(r"\S"))
        server.process.send_signal(signal.SIGTERM)
        expect(state).to_have_text(re.compile("Draining|Not reachable"))
        expect(page.get_by_role("button", name="Send")).to_be_disabled()
        server.wait(TIMEOUT_MS / 1000)
        expect(state).to_have_text("Not reachable")
        expect(page.locator("#main")).to_have_class("stale")

        port = server.url.rpartition(":")[2]
        serve(*options, "--port", port).wait_ready()
        expect(state).to_have_text("Ready")
        expect(page.locator("#main")).not_to_have_class("stale")
        page.get_by_role("spinbutton", name="Most tokens").fill("5")
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#answer-note")).to_contain_text("ended by")
        page.wait_for_function(
            "first => document.getElementById('timeline').getAttribute('aria-valuemax') < first",
            arg=first,
        )

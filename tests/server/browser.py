"""A headless Chromium that fails tests for what a page must not do."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
NEEDS_BROWSER = (
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None, reason="needs Chromium; on Debian: apt-get install chromium"
    ),
)
TIMEOUT_MS = 60_000
"""For a machine that does much else; nothing waits for it that goes well."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run the system's Chromium."""
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # as root it cannot have one
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


@contextmanager
def open_page(browser: Browser, url: str, provoked: str | None = None, **options) -> Iterator[Page]:
    """Open a page, and at the end check that all it did was talk to its own server, without errors.

    Args:
        browser: From `chromium`.
        url: The page's.
        provoked: What complaints on the console hold that the test causes on purpose.
        **options: Of the browser's context.
    """
    context = browser.new_context(**options)
    context.set_default_timeout(TIMEOUT_MS)
    errors: list[str] = []
    hosts: set[str] = set()
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(f"error: {error}"))
    page.on("console", lambda message: errors.extend(_complaints(message)))
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.goto(url)
    yield page
    context.close()
    assert hosts <= {urlsplit(url).netloc, ""}, hosts  # "" is that of data: URLs
    assert [text for text in errors if provoked is None or provoked not in text] == []


def _complaints(message: ConsoleMessage) -> list[str]:
    """Return errors and warnings; a status that is no success is none of the page's."""
    if message.type not in ("error", "warning") or "Failed to load resource" in message.text:
        return []
    return [f"{message.type}: {message.text}"]

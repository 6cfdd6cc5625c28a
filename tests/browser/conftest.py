"""A real Chromium, headless, and pages in it that say what they complained of and what they asked the network for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from unit import report_samples

from numerics_suite.reports.html import write_html

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@dataclass
class Opened:
    """A page, the errors of its console, and the addresses that it asked for."""

    page: Any
    errors: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    found = os.environ.get("NUMERICS_CHROMIUM") or shutil.which("chromium")
    if not found:
        pytest.skip("no Chromium: install the package chromium, or name one with NUMERICS_CHROMIUM")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, headless=True, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The file of a sample report by its name, written once."""
    made: dict[str, Path] = {}

    def report(name: str) -> Path:
        if name not in made:
            made[name] = write_html(tmp_path_factory.mktemp(name), getattr(report_samples, name)())
        return made[name]

    return report


@pytest.fixture
def opened(chromium: Any, reports: Any) -> Any:
    """Open a sample report; leaving the block checks that it neither complained nor asked the network for anything."""

    @contextmanager
    def open_report(
        name: str, *, width: int = 1280, height: int = 800, dark: bool = False, scripts: bool = True, anchor: str = ""
    ) -> Iterator[Any]:
        context = chromium.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            java_script_enabled=scripts,
        )
        seen = Opened(page=context.new_page())
        seen.page.on(
            "console",
            lambda message: seen.errors.append(message.text) if message.type in {"error", "warning"} else None,
        )
        seen.page.on("pageerror", lambda error: seen.errors.append(str(error)))
        seen.page.on("request", lambda request: seen.asked.append(request.url))
        seen.page.goto(reports(name).as_uri() + anchor)
        try:
            yield seen.page
        finally:
            context.close()
        assert seen.errors == []
        assert [url for url in seen.asked if not url.startswith(("file:", "data:"))] == []

    return open_report

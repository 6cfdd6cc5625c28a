"""Makes the pictures of README.md from one real run of its first example: a finding in the terminal, and the HTML report.

python tools/readme_pictures.py    (needs playwright and Chromium, or NUMERICS_CHROMIUM=PATH)
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from numerics_suite.core.records import RunResult
from numerics_suite.reports.documents import CheckRun, Documents, read_check
from numerics_suite.reports.findings import block
from numerics_suite.reports.lines import WIDTH
from numerics_suite.reports.terminal import COLOURS
from numerics_suite.reports.view.cards import cards_of
from numerics_suite.reports.view.places import places_of
from numerics_suite.reports.view.problems import problems_of

ASSETS = Path(__file__).resolve().parents[1] / "docs" / "assets"
CHECK = "check fixture:glm4-tiny --precision pure-fp16 --attn sdpa --checks train.*"
FONT_FACES = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)
"""Fonts of another host, which a picture in a page cannot load."""


def main() -> None:
    """Run the example and write both pictures."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = ["--json", "results.json", "--report", "report"]
        command = [sys.executable, "-m", "numerics_suite", *CHECK.split(), *wanted]
        status = subprocess.run(command, cwd=folder, check=False).returncode  # noqa: S603 - our own command
        if status != 1:
            sys.exit(f"the example ended with {status}, not with its finding")
        _, run = read_check(Path(folder, "results.json"), "--json")
        (ASSETS / "finding.svg").write_text(terminal_picture(run), encoding="utf-8")
        photograph(Path(folder, "report", "index.html"), ASSETS / "report.png")


def terminal_picture(run: RunResult) -> str:
    """The findings in the terminal's colours, as SVG.

    Args:
        run: of the results file.
    """
    console = Console(record=True, file=StringIO(), width=WIDTH, force_terminal=True, color_system="256")
    for card in cards_of(problems_of(places_of(Documents(runs=(CheckRun(label="", result=run),))))):
        for line in block(card):
            text = Text(line.text)
            style = " ".join(COLOURS.get(word, word) for word in line.style.split())
            text.stylize(style, 0, line.styled if line.styled is not None else len(text))
            console.print(text, soft_wrap=True)
    picture = console.export_svg(title="numerics-suite check", theme=MONOKAI, unique_id="finding")
    return FONT_FACES.sub("", picture) + "\n"


def photograph(page: Path, picture: Path) -> None:
    """The top of the report as PNG.

    Args:
        page: the HTML file.
        picture: to write.
    """
    found = os.environ.get("NUMERICS_CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        shown = browser.new_page(viewport={"width": 1000, "height": 680}, color_scheme="light")
        shown.goto(page.as_uri())
        shown.screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    main()

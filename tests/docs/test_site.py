"""The site builds without a warning, links and anchors included, and asks nothing of another host."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from docs.pages import ROOT

pytestmark = [pytest.mark.docs, pytest.mark.xdist_group("site")]
NEEDED = ("mkdocs", "material", "mkdocs_static_i18n", "mkdocstrings_handlers.python")


def _missing() -> list[str]:
    return [name for name in NEEDED if importlib.util.find_spec(name.partition(".")[0]) is None]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if _missing():
        pytest.skip(f"needs the extra docs: {', '.join(_missing())}")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_both_languages_are_there(site):
    assert '<html lang="en"' in (site / "index.html").read_text(encoding="utf-8")
    assert '<html lang="zh"' in (site / "zh" / "tutorial" / "index.html").read_text(encoding="utf-8")


def test_nothing_is_fetched_from_another_host(site):
    loaded = re.compile(
        r'<(?:script|img|iframe|source)[^>]* src="(https?:[^"]+)"|<link[^>]* rel="(?:stylesheet|preconnect|icon)"[^>]*?href="?(https?:[^">]+)'
    )
    for page in site.rglob("*.html"):
        assert not loaded.findall(page.read_text(encoding="utf-8")), page


def test_the_reference_is_part_of_it(site):
    assert "load.head-init" in (site / "reference" / "checks" / "index.html").read_text(encoding="utf-8")
    assert "every_parameters" in (site / "reference" / "api" / "index.html").read_text(encoding="utf-8")

"""The tox.ini that a project copies, and the page that tells of it."""

from __future__ import annotations

import configparser
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "tox.ini"
PAGE = ROOT / "docs" / "howto" / "adopt-tox.md"


def read(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(text)
    return parser


def test_the_page_shows_the_example_as_it_is():
    (shown,) = re.findall(r"```ini\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    example = read(EXAMPLE.read_text(encoding="utf-8"))
    for section, keys in read(shown).items():
        for key, value in keys.items():
            assert example[section][key] == value


def test_the_example_and_our_own_matrix_name_the_same_releases():
    def releases(path: Path) -> set[str]:
        return set(re.findall(r"^\s+tf\w+: transformers.*$", path.read_text(encoding="utf-8"), re.MULTILINE))

    assert releases(EXAMPLE) == releases(ROOT / "tox.ini")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tox") is None, reason="needs tox and tox-uv (the extra dev)")
def test_a_project_that_copied_the_example_runs_the_suite_in_it(tmp_path):
    project = tmp_path / "project"
    wheels = tmp_path / "wheels"
    project.mkdir()
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", wheels, ROOT], check=True, capture_output=True
    )
    (project / "tox.ini").write_text(EXAMPLE.read_text(encoding="utf-8"), encoding="utf-8")
    (project / "pyproject.toml").write_text(
        '[tool.numerics-suite]\nsubjects = ["fixture:glm4-tiny"]\nprecision = ["bf16"]\nattn = ["sdpa"]\n',
        encoding="utf-8",
    )
    folders = ",".join([str(wheels), *os.environ.get("PIP_FIND_LINKS", "").split()])  # uv wants commas, pip spaces
    run = subprocess.run(
        [sys.executable, "-m", "tox", "-e", "tf457", "--", "--numerics-json", "out.json"],
        cwd=project,
        env={
            **os.environ,
            "UV_FIND_LINKS": folders,
            "UV_CONSTRAINT": str(ROOT / "constraints.txt"),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert '"transformers": "4.57.6"' in (project / "out.json").read_text(encoding="utf-8")

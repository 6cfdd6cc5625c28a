"""The generated reference tells of everything that the code has, and of nothing that it has not."""

from __future__ import annotations

import json
import os
import sys

import pytest
from docs.pages import ROOT

import numerics_suite
from numerics_suite.cli.main import COMMANDS
from numerics_suite.core.registry import check_ids, get_check
from numerics_suite.diagnosis.remedy_words import DESCRIPTIONS
from numerics_suite.judgement.budgets import all_budgets
from numerics_suite.settings import choices
from numerics_suite.settings.table import OPTIONS


@pytest.fixture(scope="module")
def reference():
    """tools/reference.py, imported as the site's hook imports it; what that changes is put back."""
    path, variables = list(sys.path), dict(os.environ)
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import reference as module

        yield module
    finally:
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(variables)


@pytest.fixture(scope="module")
def pages(reference):
    return reference.pages()


def test_every_command_is_there_with_its_options(pages):
    text = pages["reference/command-line.md"]
    assert all(f"\n## {command}\n" in text for command in COMMANDS)
    assert all(flag in text for option in OPTIONS for flag in option.flags if flag.startswith("--"))


def test_every_option_is_there_under_each_name(pages):
    rows = [line for line in pages["reference/options.md"].splitlines() if line.startswith("| ")]
    for option in OPTIONS:
        assert any(f"`{option.key}`" in row for row in rows) or option.key is None, option
        assert any(option.help.split(",")[0].split("*")[0].split("_")[0] in row for row in rows), option


def test_every_check_is_there_with_its_question_and_budgets(reference, pages):
    text = pages["reference/checks.md"]
    for check in check_ids():
        section = text.partition(f"\n### {check}\n")[2].partition("\n### ")[0]
        assert reference.prose(get_check(check).doc) in section
        for (owner, measurement), budget in all_budgets().items():
            if owner == check:
                assert f"- `{measurement}` at most **{budget.limit:g}**" in section
                assert reference.prose(budget.reason) in section


def test_every_cause_and_remedy_is_there(reference, pages):
    assert all(f"\n## {cause}\n" in pages["reference/causes.md"] for cause in choices.CAUSES)
    assert all(f"\n## {remedy}\n" in pages["reference/remedies.md"] for remedy in DESCRIPTIONS)


def test_every_public_name_is_there(pages):
    named = {
        line.removeprefix("::: numerics_suite.")
        for line in pages["reference/api.md"].splitlines()
        if line.startswith(":::")
    }
    assert named == {name for name in numerics_suite.__all__ if not name.startswith("__")}


def test_every_field_that_words_tell_of_is_in_a_schema(reference):
    known = set()
    for name in reference.SCHEMAS.values():
        schema = json.loads((reference.REPORTING / name).read_text(encoding="utf-8"))
        known |= set(_fields(schema)) | {
            f"{part}.{field}" for part, content in schema.get("$defs", {}).items() for field in _fields(content)
        }
    assert set(reference.FIELDS) <= known


def _fields(part):
    for name, field in part.get("properties", {}).items():
        yield name
        for inner in (field, field.get("items", {})):
            yield from (f"{name}.{each}" for each in _fields(inner))

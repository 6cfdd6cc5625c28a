"""The reference pages of the site, made from the code whenever it is built: nothing here is written down twice.

`pages()` gives the Markdown of each by its path; `tools/site.py` hands them to mkdocs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# What happens to be installed beside the package has no place in its reference.
os.environ["NUMERICS_SUITE_EXTENSIONS"] = "off"

from reference_words import COMPARED, FIELDS

import numerics_suite
from numerics_suite.cli.main import COMMANDS
from numerics_suite.core.records import Budget
from numerics_suite.core.registry import GROUPS, CheckSpec, check_ids, get_check
from numerics_suite.diagnosis.experiments import DECISIVE
from numerics_suite.diagnosis.remedies import CURES
from numerics_suite.diagnosis.remedy_words import COST, DESCRIPTIONS
from numerics_suite.diagnosis.root_causes import REMEDIES
from numerics_suite.judgement.budgets import all_budgets, budgets_of
from numerics_suite.reports.view.causes import why
from numerics_suite.reports.view.formats import sentence
from numerics_suite.settings import choices
from numerics_suite.settings.accept import AcceptEntry
from numerics_suite.settings.table import OPTIONS, Option

REPORTING = Path(numerics_suite.__file__).parent / "reports"
SCHEMAS = {"check": "schema.json", "matrix": "schema-matrix.json", "bisect": "schema-bisect.json"}

ASKED = {"subject": "once for each subject", "precision": "once in each precision", "cell": "in every cell"}
NEEDS = {
    "checkpoint": "files of a checkpoint",
    "token-ids": "a model that takes token ids",
    "head": "a classification head",
    "causal": "a causal model",
    "tokenizer": "a tokenizer",
}


def pages() -> dict[str, str]:
    """Markdown of each generated page, by its path in the site's sources."""
    return {
        "reference/command-line.md": command_line(),
        "reference/options.md": options(),
        "reference/results.md": results(),
        "reference/checks.md": checks(),
        "reference/causes.md": causes(),
        "reference/remedies.md": remedies(),
        "reference/api.md": api(),
    }


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table.

    Args:
        heads: of the columns.
        rows: cells, whose bars are escaped.
    """
    lines = [list(heads), ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def code(text: str) -> str:
    """Inline code, also of what holds a backtick."""
    return f"`{text}`" if "`" not in text else f"`` {text} ``"


def prose(text: str) -> str:
    """Text of the code as Markdown: what would be taken for HTML or emphasis stays as it is written."""
    return text.replace("<", "&lt;").replace("*", r"\*").replace("_", r"\_")


def codes(names: Iterable[str], *, link: str = "") -> str:
    """Names as inline code, each a link to its heading on a page where one is given."""
    return " ".join(f"[`{name}`]({link}#{anchor(name)})" if link else code(name) for name in names) or "–"


def anchor(name: str) -> str:
    """The anchor that a heading of this name gets."""
    return "".join(letter for letter in name.lower() if letter.isalnum() or letter in "-_")


# --- the command line --------------------------------------------------------------------------------------------


def command_line() -> str:
    """Every command with what it takes."""
    head = (
        "# Command line\n\n`numerics-suite COMMAND`, also `python -m numerics_suite COMMAND`. Exit status: **0** passed, **1** findings, "
        "**2** interrupted, **3** a check could not be carried out, **4** bad input (one line says what), **5** nothing ran, "
        "or a time limit left some out.\n\n"
    )
    overview = table(("command", "what it does"), ((f"[`{name}`](#{name})", text) for name, text in COMMANDS.items()))
    return head + overview + "".join(map(_command, COMMANDS))


def _command(name: str) -> str:
    parser: argparse.ArgumentParser = importlib.import_module(f"numerics_suite.cli.{name}").make_parser()
    usage = f"```text\n{(parser.usage or parser.prog).strip()}\n```\n"
    groups = "".join(_group(name, group) for group in parser._action_groups)  # noqa: SLF001
    examples = (parser.epilog or "").removeprefix("examples:\n").rstrip()
    return (
        f"\n## {name}\n\n{parser.description}\n\n{usage}{groups}"
        f"\n**Examples**\n\n```text\n{examples.replace('%%', '%')}\n```\n"
    )


def _group(command: str, group: argparse._ArgumentGroup) -> str:
    rows = [
        (_flags(action), prose((action.help or "").replace("%%", "%")))
        for action in group._group_actions  # noqa: SLF001 - argparse has no other way to ask
        if action.help != argparse.SUPPRESS and action.dest != "help"
    ]
    if not rows:
        return ""
    title = {"positional arguments": "arguments", "options": f"options of `{command}` alone"}.get(group.title or "")
    return f"\n{title or group.title}:\n\n{table(('option', 'what it does'), rows)}"


def _flags(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
    return code(", ".join(action.option_strings) + value) if action.option_strings else code(value.strip())


# --- options and keys --------------------------------------------------------------------------------------------


def options() -> str:
    """Each option under each of its names."""
    text = (
        "# Options and keys\n\nOne option has up to three names: on the command line, under pytest, and in `[tool.numerics-suite]` of "
        "`pyproject.toml`. The command line is over pytest's option, that over the file, that over the default. An unknown key is an "
        "error, and so is a value that cannot be used. Paths in the file are relative to its folder.\n"
    )
    for group in dict.fromkeys(option.group for option in OPTIONS):
        rows = [_option(option) for option in OPTIONS if option.group == group]
        text += f"\n## {group[0].upper()}{group[1:]}\n\n"
        text += table(("command line, pytest", "key", "default", "what it does"), rows)
    return text + _accepted() + _twins()


def _option(option: Option) -> tuple[str, ...]:
    value = f" {option.metavar}" if option.metavar and option.flags != ("SUBJECT",) else ""
    opposite = [flag.replace("--", "--no-", 1) for flag in option.flags if option.form == "switch"]
    twin = [option.twin] if option.shown else []
    names = [*(f"{flag}{value}" for flag in option.flags), *opposite, *twin]
    key = code(option.key) if option.key else "–"
    return "<br>".join(map(code, names)) or "–", key, _default(option.default), prose(option.help)


def _default(value: Any) -> str:
    if value is None or value in ((), ""):
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    return code(",".join(map(str, value)) if isinstance(value, tuple) else str(value))


def _accepted() -> str:
    """The keys of an accepted finding, from the docstring of its record."""
    rows = [
        (code(name), "yes" if name in {"check", "reason"} else "no", prose(text))
        for name, text in attributes(AcceptEntry).items()
    ]
    return (
        "\n## Accepted findings\n\nEach `[[tool.numerics-suite.accept]]` is a finding that you know. It is shown and does not fail; "
        "an entry that matched nothing that ran, or is past its date, fails.\n\n"
        + table(("key", "needed", "what it selects"), rows)
    )


def _twins() -> str:
    return (
        "\n## Markers\n\n`gpu` is set on the cells of an accelerator, `slow` on what takes minutes. `pytest -m gpu` with no accelerator "
        "visible ends with exit 5 where the suite was named or `collect = true` is set.\n"
    )


def attributes(record: type) -> dict[str, str]:
    """The fields of a record and what its docstring says of each.

    Args:
        record: a class whose docstring has `Attributes:`.
    """
    lines = (record.__doc__ or "").partition("Attributes:")[2].strip("\n").splitlines()
    found: dict[str, str] = {}
    for line in lines:
        if line.strip() and len(line) - len(line.lstrip()) <= 8 and ":" in line:
            name, _, text = line.strip().partition(":")
            found[name] = text.strip()
        elif line.strip() and found:
            found[next(reversed(found))] += f" {line.strip()}"
    return found


# --- checks, causes, remedies ------------------------------------------------------------------------------------


def checks() -> str:
    """Each check: its question, when it is asked, and its budgets with their reasons."""
    text = (
        "# Checks\n\nA check asks one question and measures. Whether a measurement passes is decided by its budget: the largest value that "
        "passes, with the reason. A measurement without a budget only informs.\n\n"
        + table(
            ("check", "its question"),
            ((f"[`{name}`](#{anchor(name)})", prose(get_check(name).doc)) for name in check_ids()),
        )
    )
    for group in GROUPS:
        names = [name for name in check_ids() if name.startswith(f"{group}.")]
        text += f"\n## The group `{group}`\n" + "".join(_check(get_check(name)) for name in names)
    return text


def _check(spec: CheckSpec) -> str:
    facts = [f"Asked {ASKED[spec.scope]}"]
    facts += ["of batches that Hypothesis draws"] * spec.batches + ["by training"] * spec.trains
    needs = [NEEDS[need] for need in sorted(spec.needs)]
    tail = f"; needs {', '.join(needs)}" if needs else ""
    rows = "".join(_budget(budget) for budget in budgets_of(spec.id).values())
    return f"\n### {spec.id}\n\n**{prose(spec.doc)}**\n\n{', '.join(facts)}{tail}.\n\n{rows}"


def _budget(budget: Budget) -> str:
    return (
        f"- {code(budget.measurement)} at most **{budget.limit:g}**: cause [`{budget.cause}`](causes.md#{anchor(budget.cause)}), "
        f"remedies {codes(budget.remedies, link='remedies.md')}.\n  {prose(budget.reason)}\n"
    )


def causes() -> str:
    """Each cause: what it means, the experiment that decides, the checks that name it and the remedies."""
    text = (
        "# Causes\n\nA finding's `cause` is one word for scripts. A cause is a claim about what would be otherwise under one changed "
        "condition; where there is such a condition it is changed on a fresh copy and the failing check is asked again, and the outcome "
        "is in the finding's evidence. A place that a replay finds may name another cause than the check's budget.\n"
    )
    for cause in choices.CAUSES:
        owners = [budget for budget in all_budgets().values() if budget.cause == cause]
        cures = dict.fromkeys((*REMEDIES.get(cause, ()), *(name for owner in owners for name in owner.remedies)))
        named = dict.fromkeys(owner.check for owner in owners)
        decided = "; ".join(f"{each.name}, the check {each.expected}" for each in DECISIVE.get(cause, ()))
        decided = (
            "loaded without poison, the tensor holds something else" if cause == "uninitialised-parameters" else decided
        )
        text += f"\n## {cause}\n\n{sentence(why(cause, {}))}.\n\n"
        text += f"- decided by: {decided or 'it is seen, not concluded'}\n" if cause != "unknown" else ""
        text += f"- from: {codes(named, link='checks.md')}\n" if named else "- from: a replay of the failing case\n"
        text += f"- remedies: {codes(cures, link='remedies.md')}\n"
    return text


def remedies() -> str:
    """Each remedy, cheapest for the user first, with whether it can be tried."""
    text = (
        "# Remedies\n\nEach remedy that applies is tried on a fresh copy: the failing check is asked again, no weight may be left unsound, "
        "and a cell that can train must train. `verified` is true where that was seen, false where it did not help, and null "
        "where it was not tried. Cheapest for you first:\n"
    )
    for name in COST:
        text += f"\n## {name}\n\n{prose(DESCRIPTIONS[name][0].upper() + DESCRIPTIONS[name][1:])}.\n\n{_tried(name)}\n"
    return text


def _tried(name: str) -> str:
    if name in {"newer-version", "pin-version"}:
        return "Tried by `--try-versions`, in environments of other releases."
    if name == "lower-learning-rate":
        return "Tried: the largest stable rate is found by bisection."
    return "Tried on a copy." if name in CURES else "Not tried: it needs what is not on this machine."


# --- results and API ---------------------------------------------------------------------------------------------


def results() -> str:
    """The files that commands write, from their schemas."""
    text = (
        "# Results files\n\nWhat `--json FILE` writes. Fields may be added; a field or name here keeps its meaning. Numbers that are not finite "
        'are the strings `"NaN"`, `"Infinity"` and `"-Infinity"`. The schemas are in the package too: '
        + ", ".join(f"[{name}]({name})" for name in SCHEMAS.values())
        + ".\n"
    )
    for command, name in SCHEMAS.items():
        schema = json.loads((REPORTING / name).read_text(encoding="utf-8"))
        text += f"\n## {command}\n\n{_fields(schema, '')}"
        for part, content in schema.get("$defs", {}).items():
            text += f"\n### {part} {{#part-{part}}}\n\n{prose(content.get('description', ''))}\n\n"
            text += _fields(content, f"{part}.") if "properties" in content else f"{_type(content)}\n"
    compared = ((code(name), what) for name, what in COMPARED.items())
    return f"{text}\n## compare\n\n`subjects` has one entry for each pair of cells:\n\n{table(('field', 'what it is'), compared)}"


def _fields(part: Mapping[str, Any], prefix: str) -> str:
    return table(("field", "type", "always", "what it is"), _rows(part, prefix, ""))


def _rows(part: Mapping[str, Any], prefix: str, within: str) -> Iterator[tuple[str, ...]]:
    for name, field in part["properties"].items():
        path = f"{within}{name}"
        told = field.get("description") or FIELDS.get(f"{prefix}{path}", "")
        yield code(path), _type(field), "yes" if name in part.get("required", ()) else "no", told
        inner = field if "properties" in field else field.get("items", {})
        if "properties" in inner:
            yield from _rows(inner, prefix, f"{path}.")


def _type(field: Mapping[str, Any]) -> str:
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#part-{name})"
    if "const" in field or "enum" in field:
        values = [code(json.dumps(value).strip('"')) for value in field.get("enum", [field.get("const")])]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if "anyOf" in field:
        return " or ".join(map(_type, field["anyOf"]))
    kind = field.get("type", "anything")
    kinds = kind if isinstance(kind, list) else [kind]
    if kinds == ["array"]:
        return f"list of {_type(field.get('items', {}))}"
    extra = field.get("additionalProperties")
    if kinds == ["object"] and isinstance(extra, dict):
        return f"object of {_type(extra)}"
    return " or ".join(kinds)


def api() -> str:
    """The public names, which mkdocstrings reads from the source."""
    laws = [name for name in numerics_suite.__all__ if name.startswith("assert_")]
    rest = [n for n in numerics_suite.__all__ if n not in laws and not n.startswith("__")]
    watching = "".join(f"\n::: numerics_suite.{name}\n" for name in sorted(rest, key=lambda name: name != "watch"))
    return (
        "# Python API\n\nEverything that `import numerics_suite` offers. torch is imported when one of these is first used. What "
        "[extensions](../extending.md) build on is in `numerics_suite.extending`; nothing else is public.\n\n## In a training loop\n"
        + watching
        + "\n## In your own tests\n"
        "\nThe suite's laws and budgets on any `nn.Module`, each as an assertion that says what was measured, where, and what "
        "was allowed.\n" + "".join(f"\n::: numerics_suite.{name}\n" for name in laws)
    )

"""What other packages add: named without being imported, loaded on demand, and told whose it is where it is broken."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
import sys
import textwrap
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from unit.extensions_on_path import EXAMPLE, ROOT, entry_points_text, example_project, install_example, write_extension
from unit.sample_run import finding, result, sample_run

import numerics_suite.extending as public
from numerics_suite.cli.main import main
from numerics_suite.core import extensions as core
from numerics_suite.core import switch
from numerics_suite.core.errors import BadInputError, CheckError, UnsupportedError
from numerics_suite.core.records import Budget, Cell, Measurement, Remedy
from numerics_suite.core.registry import check, check_ids, get_check, own_check_ids
from numerics_suite.definitions import oracle_for
from numerics_suite.diagnosis import remedy_register as added_remedies
from numerics_suite.diagnosis.remedy_register import cost_of, cures, remedies_of
from numerics_suite.diagnosis.remedy_words import COST
from numerics_suite.engine.request import Request
from numerics_suite.judgement.budgets import budgets_of
from numerics_suite.judgement.verdicts import judge
from numerics_suite.reports.documents import CheckRun, Documents
from numerics_suite.reports.plugins import write_added
from numerics_suite.reports.results import load_schema, to_json
from numerics_suite.settings.options import from_command_line
from numerics_suite.subjects import families
from numerics_suite.subjects.families import added_families, family_of
from numerics_suite.subjects.resolve import resolve_all
from numerics_suite.subjects.validate import check_model_type
from numerics_suite.suite.check_selection import selected_checks
from numerics_suite.suite.extensions import load_extensions
from numerics_suite.suite.planning import NEEDS
from numerics_suite.versions.extensions import left_out_notes, without_extensions

CHECKS, FAMILIES, REMEDIES, REPORTERS = core.GROUPS
WHOSE = "extension acme-numerics 1.0.0: entry point "
CURE = "; repair or uninstall it, or leave all extensions out with --no-extensions (NUMERICS_SUITE_EXTENSIONS=off)"


def forget():
    for kept in (core._installed, core.load, families._loaded, added_remedies._loaded):
        kept.cache_clear()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty folder on the path, with extensions on."""
    monkeypatch.delenv(switch.SWITCH)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] in {"acme_numerics", "broken"}]:
        monkeypatch.delitem(sys.modules, name)
    forget()
    yield tmp_path
    forget()


@pytest.fixture
def example(site, monkeypatch):
    """The example of tests/extension, installed."""
    for path in install_example(site):
        monkeypatch.syspath_prepend(path)
    return site


def add(site: Path, group: str, name: str, code: str, value: str = "broken:VALUE") -> None:
    """Install an extension with one entry, whose module is `broken`."""
    write_extension(site, {group: {name: value}})
    (site / "broken.py").write_text(textwrap.dedent(code), encoding="utf-8")


def load_all(*checks: str) -> None:
    load_extensions(checks, NEEDS)
    write_added(Documents(), Path())


# --- names ---------------------------------------------------------------------------------------------------------


def test_names_are_listed_without_importing_what_they_name(example):
    assert check_ids() == (*own_check_ids(), "acme.logit-spacing")
    assert from_command_line({"checks": "acme.*"}, example).checks == ("acme.*",)
    assert core.extension_versions() == {"acme-numerics": "1.0.0"}
    assert "acme_numerics" not in sys.modules
    assert get_check("acme.logit-spacing").seeks == "largest-logit"
    assert "acme_numerics" in sys.modules


def test_a_check_that_is_installed_nowhere_is_told_so(site):
    with pytest.raises(
        BadInputError, match=r"--checks: no check matches 'acme.\*'; checks of 'acme' come with another"
    ):
        from_command_line({"checks": "acme.*"}, site)
    assert budgets_of("acme.logit-spacing") == {}, "a report of results from elsewhere"
    with pytest.raises(BadInputError, match="unknown check"):
        get_check("acme.logit-spacing")


def test_a_prefix_that_is_misspelt_has_a_hint(example):
    with pytest.raises(BadInputError, match=r"'accme.\*'; did you mean 'acme'"):
        from_command_line({"checks": "accme.*"}, example)


@pytest.mark.parametrize(
    ("group", "name", "why"),
    [
        (CHECKS, "forward.mine", "the name is one of numerics-suite's own"),
        (CHECKS, "logit-spacing", "the name must be PREFIX.NAME, as in acme.logit-range"),
        (CHECKS, "acme.Logit", "the name must be PREFIX.NAME, as in acme.logit-range"),
        (REMEDIES, "clip-grad-norm", "the name must be PREFIX.NAME, as in acme.logit-range"),
        (FAMILIES, "glm4", "the name is one of numerics-suite's own"),
        (FAMILIES, "generic", "the name is one of numerics-suite's own"),
        (REPORTERS, "a table", "the name must be lower-case letters and digits"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_though_nothing_is_loaded(site, group, name, why):
    add(site, group, name, "raise AssertionError")
    with pytest.raises(BadInputError) as told:
        load_all()
    assert str(told.value) == f"{WHOSE}'{name}' of {group}: {why}{CURE}"


@pytest.mark.parametrize("group", core.GROUPS)
def test_a_name_that_two_packages_give_is_refused(site, group):
    write_extension(site, {group: {"acme.mine": "broken:VALUE"}})
    write_extension(site, {group: {"acme.mine": "other:VALUE"}}, "other", "2.0")
    with pytest.raises(BadInputError) as told:
        load_all()
    assert str(told.value).startswith(
        f"extension other 2.0: entry point 'acme.mine' of {group}: acme-numerics 1.0.0 has"
    )


# --- values --------------------------------------------------------------------------------------------------------

CHECK = """
    from numerics_suite.extending import AddedCheck, Budget, check

    @check(check_id={id!r}, needs={needs!r}, scope={scope!r})
    def mine(context):
        {doc}

    BUDGET = dict(check={owner!r}, measurement="m", limit={limit}, cause={cause!r}, title={title!r}, reason="", remedies={remedies!r})
    VALUE = AddedCheck(spec=mine, budgets=({budgets}))
"""
SOUND = {
    "id": "acme.mine", "needs": (), "scope": "cell", "doc": '"""Is it?"""', "owner": "acme.mine", "limit": 0,
    "cause": "unknown", "title": "{value}", "remedies": (), "budgets": "Budget(**BUDGET),",
}  # fmt: skip


@pytest.mark.parametrize("sound", [{}, {"cause": "acme.own", "remedies": ("newer-version",), "title": "{facts[a]}"}])
def test_a_sound_check_is_taken(site, sound):
    add(site, CHECKS, "acme.mine", CHECK.format(**SOUND | sound))
    load_all("acme.mine")
    assert list(budgets_of("acme.mine")) == ["m"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"id": "acme.other"}, "the check's id is 'acme.other', and must be the entry point's name"),
        ({"doc": "pass"}, "the check's function has no docstring, whose first line is the question"),
        ({"needs": ("a-head",)}, "needs 'a-head', which is none of checkpoint, token-ids, head, causal"),
        ({"scope": "model"}, "scope 'model' is none of subject, precision, cell"),
        ({"budgets": ""}, "it has no budget, so nothing of it can fail"),
        ({"budgets": "Budget(**BUDGET), Budget(**BUDGET)"}, "two budgets judge the same measurement"),
        ({"owner": "forward.finite"}, "budget of 'm': it is of the check 'forward.finite', and must be of 'acme.mine'"),
        ({"limit": -1}, "budget of 'm': the limit -1 is below 0 or no number"),
        ({"limit": "float('nan')"}, "budget of 'm': the limit nan is below 0 or no number"),
        (
            {"cause": "overflw"},
            "budget of 'm': the cause 'overflw' is none of numerics-suite's and does not begin with 'acme.'",
        ),
        (
            {"cause": "other.own"},
            "budget of 'm': the cause 'other.own' is none of numerics-suite's and does not begin with 'acme.'",
        ),
        (
            {"remedies": ("acme.gone",)},
            "budget of 'm': the remedy 'acme.gone' is neither numerics-suite's nor an entry of numerics_suite.remedies",
        ),
        (
            {"title": "{worth}"},
            "budget of 'm': the title holds {worth}, which is none of facts, limit, module, parameters, step, value",
        ),
        ({"title": "{value"}, "budget of 'm': the title '{value': expected '}' before end of string"),
    ],
)
def test_a_check_that_would_be_passed_over_in_silence_is_refused(site, change, why):
    add(site, CHECKS, "acme.mine", CHECK.format(**SOUND | change))
    with pytest.raises(BadInputError) as told:
        load_all("acme.mine")
    assert str(told.value) == f"{WHOSE}'acme.mine' of {CHECKS}: {why}{CURE}"


FAMILY = "from numerics_suite.extending import AddedFamily, Family\nVALUE = AddedFamily(family=Family({}))"
REMEDY = "from numerics_suite.extending import AddedRemedy\nVALUE = AddedRemedy(description='', cure=None, {})"


@pytest.mark.parametrize(
    ("group", "name", "code", "why"),
    [
        *(
            (group, "acme.mine", code, why)
            for group in core.GROUPS
            for code, why in [
                ("import nowhere", "broken:VALUE cannot be loaded: ModuleNotFoundError: No module named 'nowhere'"),
                ("VALU = 1", "broken:VALUE cannot be loaded: AttributeError: module 'broken' has no attribute 'VALUE'"),
                ("raise SystemExit('no\\nmore')", "broken:VALUE cannot be loaded: SystemExit: no more"),
            ]
        ),
        (CHECKS, "acme.mine", "VALUE = print", "broken:VALUE is of type builtin_function_or_method, and must be AddedCheck"),
        (FAMILIES, "llama", "VALUE = 1", "broken:VALUE is of type int, and must be AddedFamily"),
        (REMEDIES, "acme.mine", "VALUE = 1", "broken:VALUE is of type int, and must be AddedRemedy"),
        (REPORTERS, "csv", "VALUE = 1", "broken:VALUE is of type int, and must be a function"),
        (
            FAMILIES, "llama", FAMILY.format("name='lama', model_types=('llama',)"),
            "the family's name is 'lama', and must be the entry point's",
        ),
        (
            FAMILIES, "llama", FAMILY.format("name='llama', model_types=()"),
            "the family has no model_types, so no checkpoint can be of it",
        ),
        (
            FAMILIES, "llama", FAMILY.format("name='llama', model_types=('llama', 'glm4')"),
            "the model type 'glm4' belongs to numerics-suite already",
        ),
        (
            FAMILIES, "llama", FAMILY.format("name='llama', model_types=('llama',), has_oracle=True"),
            "has_oracle and oracle must go together",
        ),
        (
            REMEDIES, "acme.mine", REMEDY.format("name='acme.other'"),
            "the remedy's name is 'acme.other', and must be the entry point's",
        ),
        (
            REMEDIES, "acme.mine", REMEDY.format("name='acme.mine', causes=('overflw',)"),
            "the cause 'overflw' is none of numerics-suite's",
        ),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_used_is_refused_in_one_line(site, group, name, code, why):
    add(site, group, name, code)
    with pytest.raises(BadInputError) as told:
        load_all(*([name] if group == CHECKS else []))
    assert str(told.value) == f"{WHOSE}'{name}' of {group}: {why}{CURE}"


def test_one_model_type_is_no_two_families(site):
    code = FAMILY.format("name='{0}', model_types=('llama',)").replace("VALUE", "{0}")
    (site / "broken.py").write_text(code.format("a") + "\n" + code.format("b"), encoding="utf-8")
    write_extension(site, {FAMILIES: {"a": "broken:a", "b": "broken:b"}})
    with pytest.raises(BadInputError, match="the model type 'llama' belongs to acme-numerics already"):
        added_families()


def test_what_a_check_that_is_not_asked_brings_is_not_loaded(site):
    add(site, CHECKS, "acme.mine", "raise AssertionError")
    load_all("load.finite")
    assert "broken" not in sys.modules


# --- what takes part -------------------------------------------------------------------------------------------------


def test_a_family_is_chosen_by_model_type_and_brings_its_definition(example):
    assert family_of({"model_type": "llama"}).name == "llama"
    assert oracle_for("llama").__name__ == "Llama"
    assert family_of({"model_type": "qwen2"}).name == "generic"
    assert family_of({"model_type": "glm4"}).name == "glm4"
    assert oracle_for("glm").__module__.startswith("numerics_suite.")


def test_the_first_release_of_an_added_family_is_told(site):
    add(site, FAMILIES, "later", FAMILY.format("name='later', model_types=('later',), first_release='99.1'"))
    with pytest.raises(UnsupportedError, match=r"model type later needs transformers 99\.1 or newer"):
        check_model_type(site, {"model_type": "later"}, trust_remote_code=False)


def test_a_remedy_is_for_the_causes_that_it_names_and_behind_ours(example):
    assert remedies_of("overflow") == ("acme.float32-head",)
    assert remedies_of("padding-leak") == ()
    assert "acme.float32-head" in cures()
    order = sorted([*COST, "acme.float32-head"], key=cost_of)
    assert order.index("disable-amp") < order.index("acme.float32-head") < order.index("reload-weights")


def judged(cause):
    budget = Budget(check="acme.mine", measurement="m", limit=0, cause="unknown", title="", reason="")
    return judge("acme.mine", [Measurement(name="m", value=math.nan, unit="", cause=cause)], {"m": budget})


def test_a_cause_that_a_measurement_gives_is_one_that_is_known():
    assert judged("overflow")
    assert judged("acme.own")
    for cause in ("overflw", "other.own"):
        with pytest.raises(CheckError, match=f"acme.mine gives the cause '{cause}'"):
            judged(cause)


def test_a_results_file_takes_names_with_a_prefix_and_no_others():
    def errors(check="acme.logit-spacing", cause="acme.own", remedy="acme.mine"):
        found = finding(cause, "a title", remedies=(Remedy(name=remedy, description=""),))
        run = replace(sample_run(), checks=(result(check, "bf16", status="failed", finding=found),))
        content = json.loads(json.dumps(to_json(run)))
        content["environment"]["extensions"] = {"acme-numerics": "1.0.0"}
        return list(jsonschema.Draft202012Validator(load_schema()).iter_errors(content))

    assert not errors()
    assert errors(check="acme")
    assert errors(cause="own")
    assert errors(remedy="mine")


def test_an_accept_entry_may_name_an_added_check_and_its_cause(example):
    (example / "pyproject.toml").write_text(
        '[[tool.numerics-suite.accept]]\ncheck = "acme.*"\ncause = "acme.coarse-logits"\nreason = "known"\n', "utf-8"
    )
    (entry,) = from_command_line({}, example).accept
    assert (entry.check, entry.cause) == ("acme.*", "acme.coarse-logits")


def test_every_added_reporter_writes(example, tmp_path):
    (path,) = write_added(Documents(runs=(CheckRun(label="here", result=sample_run()),)), tmp_path)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("run,check,subject")
    assert len(lines) == 1 + len(sample_run().checks)
    assert any(",failed,overflow," in line for line in lines)


def test_what_a_reporter_prints_is_not_the_answer(site, capsys):
    add(site, REPORTERS, "csv", "def VALUE(documents, folder):\n    print('done')\n    return []")
    assert write_added(Documents(), site) == ()
    assert capsys.readouterr() == ("", "done\n")


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("def VALUE(documents, folder): raise ValueError('two\\nlines')", "it failed: ValueError: two lines"),
        ("def VALUE(documents, folder): pass", "it failed: TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_a_reporter_that_fails_is_told_in_one_line(site, code, why):
    add(site, REPORTERS, "csv", code)
    with pytest.raises(BadInputError) as told:
        write_added(Documents(), site)
    assert str(told.value) == f"{WHOSE}'csv' of {REPORTERS}: {why}{CURE}"


# --- turned off ----------------------------------------------------------------------------------------------------


def off_by_variable(monkeypatch, _):
    monkeypatch.setenv(switch.SWITCH, "off")


def off_by_option(_, folder):
    assert from_command_line({"extensions": "false"}, folder).extensions is False


def off_by_pyproject(_, folder):
    (folder / "pyproject.toml").write_text("[tool.numerics-suite]\nextensions = false\n", encoding="utf-8")
    assert from_command_line({}, folder).origin("extensions") == "pyproject.toml"


@pytest.mark.parametrize("off", [off_by_variable, off_by_option, off_by_pyproject])
def test_turned_off_there_are_none_and_a_broken_one_is_no_matter(site, monkeypatch, off):
    add(site, CHECKS, "forward.mine", "raise AssertionError")
    with switch.switch_kept():
        off(monkeypatch, site)
        assert check_ids() == own_check_ids()
        assert core.extension_versions() == {}
        load_all()
    with pytest.raises(BadInputError):
        check_ids()


def test_a_check_that_is_asked_for_and_turned_off_is_an_error(example):
    settings = from_command_line({"checks": "acme.*,load.finite"}, example)
    assert selected_checks(settings) == ("load.finite", "acme.logit-spacing")
    with switch.switch_kept():
        settings = from_command_line({"checks": "acme.*,load.finite", "extensions": "false"}, example)
        with pytest.raises(
            BadInputError, match=r"--checks acme\.\*: only checks of other packages match it, and extens"
        ):
            selected_checks(settings)


def test_a_command_leaves_the_switch_as_it_was(site, monkeypatch, capsys):
    monkeypatch.chdir(site)
    assert main(["check", "nowhere", "--no-extensions"]) == 4
    assert "no such directory" in capsys.readouterr().err
    assert switch.switched_on()


def test_environments_of_other_versions_do_without_and_say_so(example):
    (example / "pyproject.toml").write_text(
        '[[tool.numerics-suite.accept]]\ncheck = "acme.*"\nreason = "known"\n'
        '[[tool.numerics-suite.accept]]\ncheck = "load.*"\nreason = "known"\n', encoding="utf-8",
    )  # fmt: skip
    given = {"checks": "acme.*,load.*", "skip": "acme.logit-spacing"}
    settings = without_extensions(from_command_line(given, example))
    assert (settings.checks, settings.skip) == (("load.*",), ())
    assert [entry.check for entry in settings.accept] == ["load.*"]
    assert left_out_notes()[0].startswith("without acme-numerics 1.0.0: ")
    with pytest.raises(BadInputError, match=r"acme\.\*: environments of other versions hold none of the packages"):
        without_extensions(from_command_line({"checks": "acme.*"}, example))
    switch.switch_off()
    assert left_out_notes() == ()


# --- the example ---------------------------------------------------------------------------------------------------


def lines(text: str) -> list[str]:
    return sorted(line for line in text.splitlines() if line)


def test_the_metadata_that_these_tests_write_is_what_the_example_is_built_with(tmp_path, monkeypatch):
    wheel = pytest.importorskip("hatchling.builders.wheel")
    monkeypatch.chdir(EXAMPLE)
    builder = wheel.WheelBuilder(str(EXAMPLE))
    (path,) = builder.build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(path) as files:
        (name,) = [name for name in files.namelist() if name.endswith("entry_points.txt")]
        assert lines(files.read(name).decode()) == lines(entry_points_text(example_project()["entry-points"]))
        assert "acme_numerics/logits.py" in files.namelist()


def test_the_names_for_authors_are_all_there():
    for name in public.__all__:
        assert getattr(public, name).__name__ == name
    used = re.findall(r"from numerics_suite\.(\w+)", "".join(file.read_text("utf-8") for file in EXAMPLE.rglob("*.py")))
    assert set(used) == {"extending"}
    with pytest.raises(AttributeError):
        _ = public.nothing


# --- old names -----------------------------------------------------------------------------------------------------

IN_OLD_NAMES = """
    from numerics_suite.extending import AddedCheck, Attempt, Batch, Budget, Evidence, Measurement, Place, Run, check

    @check(check_id="acme.mine", batches=True, of_broken=True)
    def mine(evidence: Evidence, batch: Batch):
        'Are the laws asked of the batch?'
        with evidence.tampered() as model:
            yield Measurement(name="m", value=float(not batch.law_abiding), unit="")
        assert model is evidence.model
        evidence.memo["acme"] = 1
        evidence.let_go()

    def cure(evidence, finding):
        yield Attempt(evidence=evidence, how="as it is")

    BATCH = Batch(tensors={}, law_abiding=False)
    BUDGET = Budget(check="acme.mine", measurement="m", limit=0, cause="unknown", title="", reason="")
    VALUE = AddedCheck(spec=mine, budgets=(BUDGET,))
"""


def test_an_extension_in_old_names_works_and_each_of_them_warns(site):
    add(site, CHECKS, "acme.mine", IN_OLD_NAMES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DeprecationWarning)
        spec = get_check("acme.mine")
        old = importlib.import_module("broken")
        (subject,) = resolve_all(("fixture:glm-tiny",))
        cell = Cell(subject=subject.id, precision="fp32", attn="eager", device="cpu", task=subject.task)
        context = public.CellContext(subject, cell, Request())
        batches = (context.training_batch, old.BATCH)
        assert [bool(judge(spec.id, list(spec.function(context, batch)))) for batch in batches] == [False, True]
        (attempt,) = old.cure(context, None)
        assert attempt.evidence is attempt.context is context
    assert (old.Evidence, old.Place, old.Run) == (public.CellContext, public.ModuleScope, public.CheckRun)
    assert spec.runs_on_nonfinite
    told = {str(one.message): Path(one.filename).name for one in caught if " is deprecated: use " in str(one.message)}
    assert told == {
        "Evidence is deprecated: use CellContext": "broken.py",
        "Place is deprecated: use ModuleScope": "broken.py",
        "Run is deprecated: use CheckRun": "broken.py",
        "the argument of_broken is deprecated: use runs_on_nonfinite": "broken.py",
        "the argument law_abiding is deprecated: use laws_apply": "broken.py",
        "the argument evidence is deprecated: use context": "broken.py",
        "Batch.law_abiding is deprecated: use laws_apply": "broken.py",
        "CellContext.tampered is deprecated: use modified_model": "broken.py",
        "CellContext.memo is deprecated: use cache": "broken.py",
        "CellContext.let_go is deprecated: use release": "broken.py",
        "Attempt.evidence is deprecated: use context": "test_extensions.py",
    }


def test_new_names_do_not_warn(example):
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        assert all(hasattr(public, name) for name in public.__all__)
        load_extensions(("acme.logit-spacing",), NEEDS)
    assert not get_check("acme.logit-spacing").runs_on_nonfinite


PAGE = ROOT / "docs" / "extending.md"


def test_the_page_shows_the_example_as_it_is():
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r'```(\w+) title="([^"]+)"\n(.*?)```', text, re.DOTALL)
    assert {path for _, path, _ in blocks} == {
        "tests/extension/pyproject.toml",
        *(f"tests/extension/src/acme_numerics/{name}.py" for name in ("logits", "llama", "table")),
    }
    for _, path, block in blocks:
        assert block in (ROOT / path).read_text(encoding="utf-8"), f"{path} reads otherwise"
    assert len(blocks) == text.count("```") // 2 - 1, "all but the commands are from the example"


def test_the_page_names_what_there_is():
    words = set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)))
    assert {word for word in words if word.startswith("numerics_suite.")} == {*core.GROUPS, "numerics_suite.extending"}
    assert set(NEEDS) <= words
    assert set(inspect.signature(check).parameters) <= words
    assert set(public.__all__) <= words

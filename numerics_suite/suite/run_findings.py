"""The findings of a run: each one is diagnosed in the light of those before it."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from numerics_suite.core.activity import doing
from numerics_suite.core.atomic import write_atomic
from numerics_suite.core.errors import NumericsSuiteError
from numerics_suite.core.records import Batch, Cell, CheckResult, Finding
from numerics_suite.core.registry import get_check
from numerics_suite.diagnosis.consequences import RAISES, raised
from numerics_suite.diagnosis.experiments import with_confidence
from numerics_suite.diagnosis.findings import finding
from numerics_suite.diagnosis.model_exceptions import model_raises
from numerics_suite.diagnosis.remedy_trials import CheckAnswer, answer_of, try_remedies
from numerics_suite.diagnosis.reproducer import reproducer
from numerics_suite.diagnosis.roots import following
from numerics_suite.diagnosis.versions_advice import PIN, borne_out, clean_on_a_fixture, without_pin
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.judgement.known_faults import reason_to_accept
from numerics_suite.settings.accept import matches
from numerics_suite.settings.tree import Settings
from numerics_suite.suite.driver import Outcome, ask

REPRODUCERS = Path(".numerics/reproducers")
"""Where the scripts that show a finding alone are written by default, below the folder that the command runs in."""


class RunFindings:
    """Makes the findings of a run, and remembers them for the later ones.

    Attributes:
        tries_remedies: with `--diagnose`, remedies are tried on copies; a table of many defects does without.
    """

    def __init__(self, settings: Settings, reproducers: Path) -> None:
        """Nothing is found yet; scripts go into the folder `reproducers`."""
        self._settings, self._folder = settings, reproducers
        self.tries_remedies = True
        self._reproducers: dict[tuple[str, ...], str | None] = {}
        self._exceptions: set[tuple[str, ...]] = set()
        self._roots: list[CheckResult] = []

    def of_breaches(self, check: str, outcome: Outcome, context: CellContext) -> Finding:
        """What a check found that measured more than a budget allows."""
        found = finding(outcome.breaches, context, outcome.batch, diagnose=self._settings.diagnose)
        found = self._diagnosed(check, found, context)
        if self._settings.diagnose and self.tries_remedies:
            found = replace(found, reproducer=self._reproducer(check, found, context, outcome.batch))
        return found

    def of_exception(self, check: str, error: Exception, context: CellContext) -> Finding | None:
        """A finding where the model's own code raised; None where that is an error of something else."""
        try:
            found = model_raises(error, context)
        except Exception:  # noqa: BLE001 - what cannot be diagnosed is the error that it was
            return None
        if found is None:
            return None
        of_subject, of_cell = _exception_keys(found, context.cell)
        if of_subject not in self._exceptions:
            return self._diagnosed(check, found, context)
        found = replace(found, remedies=())  # the same exception at the same line: its root names what cures it
        return found if of_cell in self._exceptions else self._following(check, found, context) or found

    def remember(self, answered: CheckResult) -> None:
        """Let later findings of the cell be consequences of this one, which an earlier process may have found."""
        found = answered.finding
        if found is None:
            return
        if found.consequence_of is None:
            self._roots.append(answered)
        if found.cause == RAISES:
            self._exceptions.update(_exception_keys(found, answered.cell))

    def reason_to_accept(self, failed: CheckResult) -> str | None:
        """Why a failure is accepted: the user's reason, or a known fault of the installed release; None where it is not."""
        import transformers

        assert failed.finding is not None
        version, today = transformers.__version__, datetime.now(tz=timezone.utc).date()
        users = (entry.reason for entry in self._settings.accept if matches(entry, failed, version, today))
        return next(users, None) or reason_to_accept(failed.check, failed.finding, version)

    def ask_again(self, check: str, cured: CellContext) -> CheckAnswer:
        """A check of a cured copy, with the batches that this run draws."""
        outcome = ask(get_check(check), cured, seed=self._settings.seed)
        return answer_of(outcome.breaches, outcome.worst)

    def _diagnosed(self, check: str, found: Finding, context: CellContext) -> Finding:
        """The finding with its experiment made and its remedies tried, where that is wanted."""
        found = borne_out(found, context)
        if not (self._settings.diagnose and self.tries_remedies):
            return found
        pinned = any(remedy.name == PIN for remedy in found.remedies)
        if pinned and clean_on_a_fixture(check, context, self.ask_again):
            found = without_pin(found)
        found = with_confidence(check, found, context, self.ask_again)
        found = replace(found, remedies=try_remedies(check, found, context, self.ask_again))
        return self._following(check, found, context) or found

    def _following(self, check: str, found: Finding, context: CellContext) -> Finding | None:
        """The finding as a consequence of an earlier one of its cell, None where nothing shows that."""
        if not (self._settings.diagnose and self.tries_remedies):
            return None
        earlier = [root for root in self._roots if root.cell == context.cell]
        return following(check, found, context, earlier, self.ask_again)

    def _reproducer(self, check: str, found: Finding, context: CellContext, batch: Batch | None) -> str | None:
        """Path of a script that shows the finding alone; one for all attentions of a precision."""
        cell = context.cell
        key = (check, cell.subject, cell.precision, found.cause)
        if key not in self._reproducers:
            with doing(f"{check}/{cell.id}: writing a script that shows it"):
                text = reproducer(check, found, context, batch)
            path = self._folder / self._script_name(key)
            try:
                if text is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_atomic(path, text, "reproducer")
            except (OSError, NumericsSuiteError):
                text = None  # a folder that cannot be written to hides no finding
            self._reproducers[key] = None if text is None else path.as_posix()
        return self._reproducers[key]

    def _script_name(self, key: tuple[str, ...]) -> str:
        """Of check, subject and precision, and of the cause: another attention may fail the same check for another reason."""
        first = not any(other[:-1] == key[:-1] for other in self._reproducers)
        return f"{'-'.join(key[:-1] if first else key)}.py"


def _exception_keys(found: Finding, cell: Cell) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """An exception by its line, of the subject and of the cell: another cell, or check, shows it without its remedies."""
    of_subject = (cell.subject, cell.task, *raised(found))
    return of_subject, (cell.id, *of_subject)

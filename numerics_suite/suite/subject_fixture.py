"""The fixture `numerics_subject` of a user's own tests: each cell of the project's settings, with its model loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from numerics_suite.core.errors import NotApplicableError, NumericsSuiteError, UnsupportedError
from numerics_suite.settings.options import from_pytest
from numerics_suite.suite.items import marks_of
from numerics_suite.suite.stash import session_key, user_session_key

if TYPE_CHECKING:
    import torch
    from torch import nn

    from numerics_suite.engine.cell_context import CellContext
    from numerics_suite.suite.session import SuiteSession

T = TypeVar("T")

NO_SUBJECT = "numerics_subject: no subject; set subjects in [tool.numerics-suite] or pass --numerics-subject"


@dataclass(frozen=True, slots=True, kw_only=True)
class NumericsSubject:
    """One subject in one precision and attention, for the assertions.

    The model is shared by all tests of the session: copy it (`copy.deepcopy`) before you train or change it.

    Attributes:
        name: of the subject, as in reports.
        precision: of `fp64 fp32 tf32 bf16 fp16 amp-bf16 amp-fp16 pure-fp16`.
        attn: attention implementation.
        device: that the model is on.
        autocast: dtype of the precision's autocast section, to hand to the assertions; None without one.
        context: of the cell; its parts that no other attribute gives may change between releases.
    """

    name: str
    precision: str
    attn: str
    device: str
    autocast: torch.dtype | None
    context: CellContext

    @property
    def model(self) -> nn.Module:
        """The model in the precision, in evaluation mode; loaded when a test first asks for it."""
        return _quietly(lambda: self.context.model)

    @property
    def batch(self) -> dict[str, Any]:
        """Keyword arguments of a call, labels included where the model takes some; the same in every run of a seed."""
        return _quietly(lambda: dict(self.context.training_batch.tensors))

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding, as `assert_causal` needs it."""
        return _quietly(lambda: self.context.vocab_size)


@pytest.fixture(scope="session")
def numerics_subject(request: pytest.FixtureRequest) -> NumericsSubject:
    """A configured subject in one precision: `.model`, `.batch`, `.name`, for numerics_suite.assert_… in your own tests."""
    import torch

    from numerics_suite.devices.precisions import precision

    session, cell = _session(request.config), request.param
    assert session is not None, "without a subject the parameter is a skip"
    recipe = precision(cell.precision)
    return NumericsSubject(
        name=cell.subject,
        precision=cell.precision,
        attn=cell.attn,
        device=cell.device,
        autocast=None if recipe.autocast is None else getattr(torch, recipe.autocast),
        context=session.context(cell),  # holds one cell's model at a time
    )


def parametrize_subjects(metafunc: pytest.Metafunc) -> None:
    """One parameter for each cell of the project's settings, in the scope of the session: each model is loaded once."""
    try:
        found = list(_parameters(metafunc.config))
    except NumericsSuiteError as error:
        raise pytest.Collector.CollectError(str(error)) from None
    metafunc.parametrize("numerics_subject", found, indirect=True, scope="session")


def _parameters(config: pytest.Config) -> Iterator[Any]:
    """A pytest parameter for each cell; one that is skipped where the settings name no subject."""
    session = _session(config)
    if session is None:
        yield pytest.param(None, id="no-subject", marks=pytest.mark.skip(reason=NO_SUBJECT))
        return
    from numerics_suite.devices.device import lacks
    from numerics_suite.devices.precisions import precision

    for cell in session.plan.cells:
        marks = marks_of(cell, config)
        if (reason := lacks(precision(cell.precision), cell.device)) is not None:
            marks = [*marks, pytest.mark.skip(reason=reason)]
        yield pytest.param(cell, id=cell.param_id, marks=marks)


def _session(config: pytest.Config) -> SuiteSession | None:
    """The suite's own session where it runs too, else one for the user's tests; None where no subject is configured."""
    if session_key in config.stash and config.stash[session_key].settings.subjects:
        return config.stash[session_key]
    settings = from_pytest(config)
    if not settings.subjects:
        return None
    if user_session_key not in config.stash:
        from numerics_suite.suite.session import SuiteSession

        config.stash[user_session_key] = SuiteSession(settings)
    return config.stash[user_session_key]


def _quietly(ask: Callable[[], T]) -> T:
    """An answer of the context: skips the test where there is none, and leaves warnings of loading to their owners.

    A project with `filterwarnings = error` means its own code; transformers and a checkpoint's code warn while they load.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ask()
    except (NotApplicableError, UnsupportedError) as error:
        pytest.skip(str(error))
    except NumericsSuiteError as error:
        pytest.fail(str(error), pytrace=False)

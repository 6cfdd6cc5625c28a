"""Why a parameter is not in the requested dtype: the class names another one, or the load got a config object."""

from __future__ import annotations

from collections.abc import Iterable

from numerics_suite.core.errors import NumericsSuiteError
from numerics_suite.core.records import Fact
from numerics_suite.core.text import listed
from numerics_suite.devices.condition import dtype_of
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.subjects.built_model import built_dtypes, without_adapter
from numerics_suite.subjects.load import default_dtype
from numerics_suite.subjects.own_dtype import named_dtypes

SHOWN = 5


def named_by_class(context: CellContext, names: Iterable[str]) -> dict[str, Fact]:
    """A fact naming the parameters that the class builds in a dtype of its own; empty if there is none.

    Args:
        context: the cell.
        names: of parameters that are not in the requested dtype, or would not be after saving and loading.
    """
    model, asked = without_adapter(context.model), dtype_of(context.recipe.parameters)
    built = built_dtypes(model, asked)
    own = tuple(name for name in names if built.get(name, asked) != asked)
    if not own:
        return {}
    dtypes = ", ".join(sorted({str(built[name]).removeprefix("torch.") for name in own}))
    lines = " and ".join(map(str, named_dtypes(model, own, asked)))
    code = f"{lines}, which builds it in the dtype that config.json names" if lines else "change its code"
    told = f"builds {listed(own, SHOWN)} in {dtypes} whatever is asked for: {code}, or cast after every load"
    return {"the class": f"{type(model).__name__} {told}"}


def only_with_config(context: CellContext) -> bool:
    """Whether a load without a config object respects the requested dtype: only the load with one ignores it.

    Up to 4.49 the requested dtype is not written into that object, and some code builds in the dtype that it names.

    Args:
        context: a cell whose model ignores the dtype.
    """
    if context.subject.path is None or context.subject.adapter_base or context.subject.quantized:
        return False
    try:
        return default_dtype(context.subject, context.recipe.parameters) == context.recipe.parameters
    except NumericsSuiteError:
        return False

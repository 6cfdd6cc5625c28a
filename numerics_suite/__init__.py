"""Numerical regression harness for GLM-4 checkpoints across versions and precisions.

The assertions are for a user's own tests, the watch for a training loop; they import torch when they are first asked
for, not with the package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numerics_suite.judgement.assertions import (
        assert_batch_invariant,
        assert_causal,
        assert_finite,
        assert_gradients_match,
        assert_matches_reference,
        assert_padding_invariant,
    )
    from numerics_suite.training_watch.alarms import NumericsError, NumericsWarning
    from numerics_suite.training_watch.callback import NumericsCallback
    from numerics_suite.training_watch.session import watch

__all__ = [
    "NumericsCallback",
    "NumericsError",
    "NumericsWarning",
    "__version__",
    "assert_batch_invariant",
    "assert_causal",
    "assert_finite",
    "assert_gradients_match",
    "assert_matches_reference",
    "assert_padding_invariant",
    "watch",
]

__version__ = "0.1.0"


_HOMES = {
    "NumericsCallback": "numerics_suite.training_watch.callback",
    "NumericsError": "numerics_suite.training_watch.alarms",
    "NumericsWarning": "numerics_suite.training_watch.alarms",
    "watch": "numerics_suite.training_watch.session",
}
"""Where the public names are; the assertions are in the one place of theirs."""


def __getattr__(name: str) -> Any:
    """The public names, on first use."""
    if name in __all__:
        import importlib

        return getattr(importlib.import_module(_HOMES.get(name, "numerics_suite.judgement.assertions")), name)
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)

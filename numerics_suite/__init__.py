"""Numerical regression harness for GLM-4 checkpoints across versions and precisions.

The assertions are for a user's own tests; they import torch when they are first asked for, not with the package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numerics_suite.judging.assertions import (
        assert_batch_invariant,
        assert_causal,
        assert_finite,
        assert_gradients_match,
        assert_matches_reference,
        assert_padding_invariant,
    )

__all__ = [
    "__version__",
    "assert_batch_invariant",
    "assert_causal",
    "assert_finite",
    "assert_gradients_match",
    "assert_matches_reference",
    "assert_padding_invariant",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The assertions, on first use."""
    if name in __all__:
        from numerics_suite.judging import assertions

        return getattr(assertions, name)
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)

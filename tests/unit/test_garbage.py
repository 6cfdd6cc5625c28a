"""What lives is set aside from collections, and what is made within is not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from numerics_suite.core import garbage
from numerics_suite.core.garbage import living_set_aside, none_collected, set_rest_aside


class Cycle:
    """Freed by a collection only."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _nothing_is_frozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(garbage, "_set_aside", False)
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


def collected(seen: weakref.ref[Cycle]) -> bool:
    gc.collect()
    return seen() is None


def test_what_lived_before_is_looked_at_again_only_afterwards() -> None:
    before = Cycle()
    seen = weakref.ref(before)
    with living_set_aside():
        del before
        assert not collected(seen)
    assert collected(seen)


def test_what_is_made_within_is_collected_within_also_in_a_second_one() -> None:
    with living_set_aside():
        model = Cycle()
        seen = weakref.ref(model)
        with living_set_aside():
            del model
            assert collected(seen)
        assert gc.get_freeze_count()
    assert not gc.get_freeze_count()


def test_what_came_to_live_within_is_set_aside_on_request() -> None:
    set_rest_aside()
    assert not gc.get_freeze_count()
    with living_set_aside():
        imported = Cycle()
        seen = weakref.ref(imported)
        set_rest_aside()
        del imported
        assert not collected(seen)
    assert collected(seen)


def test_no_collection_begins_within_an_import() -> None:
    with none_collected():
        assert not gc.isenabled()
        with none_collected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()

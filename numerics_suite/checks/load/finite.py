"""load.finite."""

from __future__ import annotations

from collections.abc import Iterable

from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.evidence import Evidence
from numerics_suite.observing.finiteness import nan_count, nonfinite_count
from numerics_suite.subjects.files import read_tensor, tensor_headers


@check(scope="precision")
def finite(evidence: Evidence) -> Iterable[Measurement]:
    """Is every weight finite once it is loaded?"""
    loaded = evidence.loaded
    # What nobody wrote is load.head-init's question; a NaN there is not the checkpoint's.
    fresh = set(loaded.new_head) | set(loaded.missing) | set(evidence.unwritten)
    bad = {
        name: count
        for name, parameter in loaded.model.named_parameters()
        if name not in fresh and (count := nonfinite_count(parameter.detach()))
    }
    # A buffer of -inf is a mask; NaN is never meant.
    bad.update({name: count for name, buffer in loaded.model.named_buffers() if (count := nan_count(buffer))})
    stored_finite = [name for name in bad if _finite_in_file(evidence, name)]
    yield Measurement(
        name="non-finite",
        value=sum(bad.values()),
        unit="elements",
        module=next(iter(bad)).rpartition(".")[0] if bad else None,
        parameters=tuple(bad),
        cause="overflow" if bad and len(stored_finite) == len(bad) else None,
        facts={"finite in the file": ", ".join(stored_finite)} if stored_finite else {},
    )


def _finite_in_file(evidence: Evidence, name: str) -> bool:
    """Whether the checkpoint stores that tensor and stores it finite, so that the cast to this dtype broke it."""
    path = evidence.subject.path
    if path is None or evidence.subject.adapter_base or name not in tensor_headers(path):
        return False
    return nonfinite_count(read_tensor(path, name)) == 0

"""Assertions for a user's own tests, on any `nn.Module`: the suite's laws and budgets without its checkpoints.

Each fails with an AssertionError that says what was measured and where, in which mode and dtype the model ran, what was
allowed and why, and what to look at. Models run in evaluation mode (dropout off); each module's own mode is restored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.core.records import Budget
from numerics_suite.devices.condition import Condition
from numerics_suite.devices.precisions import Precision
from numerics_suite.engine.calls import call_model, input_device
from numerics_suite.engine.outputs import floating_outputs, main_output
from numerics_suite.engine.references import longest_reduction
from numerics_suite.engine.rounded_reference import run_rounded
from numerics_suite.engine.runner import Runner
from numerics_suite.engine.true_fp64 import run_true_fp64
from numerics_suite.judgement.budgets import all_budgets
from numerics_suite.judgement.verdicts import within
from numerics_suite.observations.coarse_arithmetic import coarser_ops
from numerics_suite.observations.finiteness import nonfinite_count
from numerics_suite.observations.roundoff import relative_error, rms, unit_roundoff, wide

__all__ = [
    "assert_batch_invariant",
    "assert_causal",
    "assert_finite",
    "assert_gradients_match",
    "assert_matches_reference",
    "assert_padding_invariant",
]

Batch = Mapping[str, Any]
TRUE_FP64 = "run in evaluation mode, in true fp64"


def assert_finite(value: Tensor | nn.Module | Mapping[str, Any] | Sequence[Any], name: str = "value") -> None:
    """Assert that no element is NaN or infinite.

    Args:
        value: a tensor, a model's output, a mapping or sequence of tensors, or a module: then its parameters, buffers and
            gradients are looked at.
        name: what the message calls it.

    Raises:
        AssertionError: naming the first bad tensor, the index of its first bad element and how many there are.
    """
    for where, tensor in _tensors(value, name):
        bad = nonfinite_count(tensor)
        if bad:
            index = tuple(int(i) for i in (~torch.isfinite(tensor.detach())).nonzero()[0])
            found = float(tensor.detach()[index])
            message = (
                f"{where} is not finite: {bad} of {tensor.numel()} elements of {str(tensor.dtype).removeprefix('torch.')} "
                f"{tuple(tensor.shape)}, first {found} at index {index}"
            )
            raise AssertionError(message)


def _tensors(value: Any, name: str) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(name, value)] if value.is_floating_point() else []
    if isinstance(value, nn.Module):
        named = [*value.named_parameters(), *value.named_buffers()]
        grads = [(f"{n}.grad", p.grad) for n, p in value.named_parameters() if p.grad is not None]
        return [(n, t) for n, t in (*named, *grads) if t.is_floating_point()]
    items = value.items() if hasattr(value, "items") else enumerate(value)
    return [found for key, item in items if item is not None for found in _tensors(item, f"{name}[{key!r}]")]


def assert_matches_reference(model: nn.Module, batch: Batch, *, autocast: torch.dtype | None = None) -> None:
    """Assert that the model's error against its true fp64 run is what its precision makes unavoidable.

    A round trip through a coarser float (`x.half().float()` in a float32 module) fails too. The rounded run makes the
    same round trip, so no ratio of errors shows it; the ops' own dtypes do.

    Args:
        model: in the precision under test.
        batch: keyword arguments of the call; where it has a 2-D `attention_mask`, real tokens only are compared.
        autocast: dtype of an autocast section around the call.

    Raises:
        AssertionError: an op computes in a coarser float than the model and `autocast` ask for, or the kernel ratio is
            over the budget of `reference.end-to-end`.
        ValueError: some op could not be lifted to float64, so there is no reference.
    """
    true, rounded = run_true_fp64(model, batch), run_rounded(model, batch, autocast=autocast)
    _trusted(true.left_out)
    name, reference = main_output(true.outputs)
    own = wide(main_output(_plain(model, batch, autocast, "reference.local"))[1]).to(reference.device)
    reference, own, twin = (_real(value, batch) for value in (reference, own, rounded.outputs[name]))
    inherent = rms(twin - reference)
    budget = all_budgets()[("reference.end-to-end", "excess")]
    ratio = rms(own - reference) / inherent if inherent else (0.0 if bool((own == reference).all()) else float("inf"))
    _hold(
        ratio / _accumulation(model, autocast),
        budget,
        f"error of '{name}'",
        f"{_worst_place(own, reference)}; {_how(model, autocast)}",
    )


def assert_gradients_match(model: nn.Module, batch: Batch, *, autocast: torch.dtype | None = None) -> None:
    """Assert that every parameter's gradient is as near to the true fp64 one as the precision allows.

    Args:
        model: in the precision under test; its output needs a `loss`, or to be a scalar.
        batch: keyword arguments of the call, with labels.
        autocast: dtype of an autocast section around the call.

    Raises:
        AssertionError: an op of the forward or backward pass computes in a coarser float than asked for; a gradient is
            over the budget of `reference.gradient`, or missing.
        ValueError: some op could not be lifted to float64.
    """
    true = run_true_fp64(model, batch, gradients=True)
    twin = run_rounded(model, batch, gradients=True, autocast=autocast)
    _trusted(true.left_out)
    assert true.gradients is not None
    assert twin.gradients is not None
    own = _own_gradients(model, batch, autocast)
    budget = all_budgets()[("reference.gradient", "excess")]
    for name, wanted in true.gradients.items():
        if name not in own:
            message = f"{name} has a gradient in float64 and none in this precision: it is detached, or underflows"
            raise AssertionError(message)
        roundoff = torch.finfo(autocast or model.get_parameter(name).dtype).eps / 2
        scale = max(rms(twin.gradients.get(name, wanted) - wanted), roundoff * rms(wanted))
        error = rms(own[name] - wanted)
        ratio = error / scale if scale else (0.0 if error == 0 else float("inf"))
        where = f"{_worst_place(own[name], wanted)}; {_how(model, autocast)}"
        _hold(ratio / _accumulation(model, autocast), budget, f"gradient of {name}", where, parameters=name)


def assert_padding_invariant(
    model: nn.Module, batch: Batch, *, pad_token_id: int = 0, sides: Sequence[str] = ("left", "right"), columns: int = 3
) -> None:
    """Assert in true fp64 that more padding leaves the real tokens' answers alone.

    Args:
        model: called with `input_ids` and `attention_mask` `[batch, sequence]`, answering `[batch, sequence, …]`.
        batch: with both; other tensors (labels) are left out.
        pad_token_id: the id that padding writes.
        sides: on which columns of padding are added, one side at a time.
        columns: how many.

    Raises:
        AssertionError: a real token's answer moves by more than 1e-10 of the answers' root mean square.
        ValueError: some op could not be lifted to float64.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    base = _true_answer(model, {"input_ids": ids, "attention_mask": mask})[mask.bool()]
    for side in sides:
        pads = torch.full((ids.shape[0], columns), pad_token_id, dtype=ids.dtype, device=ids.device)
        none = torch.zeros_like(pads, dtype=mask.dtype)
        pair_ids, pair_mask = ((pads, ids), (none, mask)) if side == "left" else ((ids, pads), (mask, none))
        more = {"input_ids": torch.cat(pair_ids, 1), "attention_mask": torch.cat(pair_mask, 1)}
        moved = _true_answer(model, more)[more["attention_mask"].bool()]
        budget = all_budgets()[("forward.padding", "true")]
        _hold(
            relative_error(moved, base), budget, f"padding on the {side}", f"{_worst_place(moved, base)}; {TRUE_FP64}"
        )


def assert_batch_invariant(model: nn.Module, batch: Batch) -> None:
    """Assert in true fp64 that each row's answer is the same alone as among its neighbours.

    Args:
        model: answering with one row per row of the batch.
        batch: tensors whose first dimension is the batch.

    Raises:
        AssertionError: a row's answer differs by more than 1e-10 of its root mean square.
        ValueError: some op could not be lifted to float64.
    """
    together = _true_answer(model, batch)
    for row in range(together.shape[0]):
        alone = _true_answer(model, {name: value[row : row + 1] for name, value in batch.items()})[0]
        budget = all_budgets()[("forward.batch", "true")]
        wanted = together[row]
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and wanted.shape[: mask[row].dim()] == mask[row].shape:
            wanted, alone = wanted[mask[row].bool()], alone[mask[row].bool()]
        _hold(relative_error(alone, wanted), budget, f"row {row} alone", f"{_worst_place(alone, wanted)}; {TRUE_FP64}")


def assert_causal(model: nn.Module, batch: Batch, *, vocab_size: int) -> None:
    """Assert in true fp64 that later tokens leave the answers at earlier positions alone.

    Args:
        model: called with `input_ids` `[batch, sequence]` and what else the batch holds, answering
            `[batch, sequence, …]`.
        batch: at least two columns.
        vocab_size: ids are changed to `(id + 1) % vocab_size`.

    Raises:
        AssertionError: an earlier answer moves by more than 1e-10 of the answers' root mean square.
        ValueError: some op could not be lifted to float64.
    """
    ids = batch["input_ids"]
    cut = ids.shape[1] // 2
    changed = ids.clone()
    changed[:, cut:] = (changed[:, cut:] + 1) % vocab_size
    base, moved = _true_answer(model, batch)[:, :cut], _true_answer(model, {**batch, "input_ids": changed})[:, :cut]
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor):
        base, moved = base[mask[:, :cut].bool()], moved[mask[:, :cut].bool()]
    budget = all_budgets()[("forward.causal", "true")]
    _hold(
        relative_error(moved, base),
        budget,
        f"tokens from column {cut} on changed",
        f"{_worst_place(moved, base)}; {TRUE_FP64}",
    )


def _true_answer(model: nn.Module, batch: Batch) -> Tensor:
    run = run_true_fp64(model, {name: value for name, value in batch.items() if name != "labels"})
    _trusted(run.left_out)
    return main_output(run.outputs)[1]


def _trusted(left_out: tuple[str, ...]) -> None:
    if left_out:
        message = f"no float64 reference for this model: {', '.join(left_out)} cannot be computed in float64"
        raise ValueError(message)


def _in_eval(model: nn.Module, run: Callable[[], Any]) -> Any:
    """Call `run` with the model in eval mode, and put every module's mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return run()
    finally:
        for module, training in modes.items():
            module.training = training


def _coarsest(model: nn.Module) -> torch.dtype:
    """The float with the fewest bits among the parameters; float32 without any."""
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return max(floats, key=unit_roundoff, default=torch.float32)


def _how(model: nn.Module, autocast: torch.dtype | None) -> str:
    """The mode and the dtypes of the run, for a message."""
    held = str(_coarsest(model)).removeprefix("torch.")
    section = "" if autocast is None else f" under autocast to {str(autocast).removeprefix('torch.')}"
    return f"run in evaluation mode, {held} parameters{section}"


def _runner(model: nn.Module, autocast: torch.dtype | None) -> Runner:
    """Runs the model as it is, in the coarsest float of its parameters."""
    held, section = (str(dtype).removeprefix("torch.") for dtype in (_coarsest(model), autocast))
    recipe = Precision(name="as it is", parameters=held, autocast=None if autocast is None else section)  # type: ignore[arg-type]
    return Runner(model, Condition(precision=recipe, device=str(input_device(model))))


def _plain(model: nn.Module, batch: Batch, autocast: torch.dtype | None, check: str) -> dict[str, Tensor]:
    run = partial(_runner(model, autocast).forward, batch)
    return floating_outputs(_in_own_precision(model, autocast, run, check))


def _own_gradients(model: nn.Module, batch: Batch, autocast: torch.dtype | None) -> dict[str, Tensor]:
    def call(called: nn.Module, tensors: Batch) -> dict[str, Tensor]:
        outputs = floating_outputs(call_model(called, tensors))
        return {"loss": outputs.get("loss", next(iter(outputs.values())))}

    run = partial(_runner(model, autocast).gradients, batch, call)
    found = _in_own_precision(model, autocast, run, "reference.gradient")
    return {name: wide(gradient) for name, gradient in found.items()}


def _in_own_precision(model: nn.Module, autocast: torch.dtype | None, run: Callable[[], Any], check: str) -> Any:
    """What `run` returns, in evaluation mode.

    Raises:
        AssertionError: an op puts out a coarser float than the parameters' and autocast's.
    """
    asked = max(_coarsest(model), autocast or torch.float64, key=unit_roundoff)
    kept: list[Any] = []
    coarser = _in_eval(model, lambda: coarser_ops(model, lambda: kept.append(run()), asked))
    if coarser:
        places = ", ".join(f"{module or 'the model itself'} ({count})" for module, count in coarser.items())
        where = f"ops by module: {places}; {_how(model, autocast)}"
        budget = all_budgets()[(check, "coarser")]
        _hold(sum(coarser.values()), budget, "coarser floats", where, module=next(iter(coarser)) or "the model")
    return kept[0]


def _real(value: Tensor, batch: Batch) -> Tensor:
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and value.shape[:2] == mask.shape:
        return value[mask.bool()]
    return value


def _accumulation(model: nn.Module, autocast: torch.dtype | None) -> float:
    """In float32 kernels accumulate in float32: the square root of the longest sum; 1 where they accumulate wider."""
    floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if autocast is not None or not floats <= {torch.float32, torch.float64}:
        return 1.0
    return math.sqrt(longest_reduction(model))


def _worst_place(got: Tensor, want: Tensor) -> str:
    if got.shape != want.shape:
        return f"shapes {tuple(got.shape)} and {tuple(want.shape)}"
    if not got.numel():
        return "nothing to compare"
    difference = (got.double() - want.double()).abs().nan_to_num(nan=float("inf"))
    flat = int(difference.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), difference.shape))
    return f"greatest difference {float(difference.flatten()[flat]):.3g} at index {index}"


def _hold(value: float, budget: Budget, what: str, where: str, **place: str) -> None:
    """Raise unless `value` is within the budget; `place` is the module or the parameters that its title names."""
    if within(value, budget.limit):
        return
    names = {"module": "the model", "parameters": None, "step": None, **place}
    title = budget.title.format(value=value, limit=budget.limit, **names)
    message = (
        f"{what}: {title}\n  measured {value:.4g}, allowed {budget.limit:g}; {where}\n  why: {budget.reason}\n"
        f"  look at: {', '.join(budget.remedies)}"
    )
    raise AssertionError(message)

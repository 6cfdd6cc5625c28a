"""The nouns of the tool as frozen records; every stage takes some and returns others.

A field that a results file has under another name says so in its metadata, for `core/typed_records.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from numerics_suite.core.deprecation import renamed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numerics_suite.core.rehearsal import Rehearsal

Task = Literal["causal-lm", "sequence-classification", "token-classification", "module"]
"""`module` is a factory's plain `nn.Module`, which has a batch of its own and no task."""

Status = Literal["passed", "failed", "accepted", "skipped", "error"]
Number = float | int
Fact = Number | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is under test: a checkpoint, its revision and its task, resolved but not loaded.

    Attributes:
        id: the name that keys everything (`--name`, fixture name, hub id without revision, directory name).
        source: SUBJECT as the user typed it.
        family: `glm`, `glm4`, `chatglm`, … or `generic`.
        path: the folder of its files, None for a factory.
        revision: the hub revision, None elsewhere.
        model_class: name of the class that will be built, None until known.
        stored_dtype: the dtype of most stored elements (`bfloat16`, …), None where unknown.
        parameters: number of stored elements, None where unknown.
        digest: `sha256:…` over the files, None for a factory and in a plan that is only listed.
        new_head: the checkpoint lacks the head of `task`, so a new one is made as fine-tuning would.
        trust_remote_code: its own code may run (by flag, or a fixture checked against its digest).
        adapter_base: folder or hub id of the base where `path` is a peft adapter.
        quantized: the checkpoint has a `quantization_config`.
        notes: what a user should know before it runs, and that is no finding.
        lacks_batch: a factory's plain module came without a batch, so it can be loaded and not run.
        config: the raw `config.json`, empty for a factory.
    """

    id: str
    source: str
    kind: Literal["directory", "hub", "fixture", "factory"]
    task: Task
    family: str
    path: Path | None = None
    revision: str | None = None
    model_class: str | None = None
    architectures: tuple[str, ...] = ()
    stored_dtype: str | None = None
    parameters: int | None = None
    digest: str | None = None
    num_labels: int = 2
    new_head: bool = False
    trust_remote_code: bool = False
    adapter_base: str | None = None
    quantized: bool = False
    notes: tuple[str, ...] = ()
    lacks_batch: bool = False
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Cell:
    """One subject at one precision, attention implementation and device: what a test runs on."""

    subject: str
    precision: str
    attn: str
    device: str
    task: str

    @property
    def id(self) -> str:
        """The cell as the tail of a check's id: `glm4-tiny/bf16/sdpa/cpu`."""
        return f"{self.subject}/{self.precision}/{self.attn}/{self.device}"

    @property
    def param_id(self) -> str:
        """The cell as a pytest parameter id: `glm4-tiny-bf16-sdpa-cpu`."""
        return f"{self.subject}-{self.precision}-{self.attn}-{self.device}"

    @property
    def named(self) -> dict[str, str]:
        """Its parts by the names of CONTRACT.md, in the order of an entry there."""
        return {name: getattr(self, name) for name in ("subject", "task", "precision", "attn", "device")}


@renamed(law_abiding="laws_apply")
@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Inputs of one forward pass.

    Attributes:
        tensors: what the model is called with: `input_ids`, `attention_mask` `[batch, sequence]` int64,
            `labels` where drawn, and whatever a factory's own batch holds.
        drawn: how it came about, as text for a finding (`padding=left lengths=[3, 7]`).
        laws_apply: False where the laws do not apply to it by definition (a pad id among the real tokens).
        label_counts: labels that count in each row of a larger sample of the user's file; empty for any other batch.
    """

    tensors: Mapping[str, Any]
    drawn: str = ""
    laws_apply: bool = True
    label_counts: tuple[int, ...] = ()
    rows_in_file: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A number with a unit, and where it was taken.

    Attributes:
        name: names the budget that judges it (`non-finite`, `kernel-ratio`); one without a budget only informs.
        value: the number; NaN is never within a budget.
        unit: `elements`, `bits`, `ratio`, `roundoffs`, …
        module: the module (dotted name) where it is worst.
        parameters: names of the parameters concerned.
        step: the training step, from 1.
        op: the aten op concerned, such as `aten.softmax.int`.
        source: `file.py:123` of that op.
        cause: the cause that an experiment inside the check established, over the budget's own.
        facts: numbers and texts that explain the value.
    """

    name: str
    value: float
    unit: str
    module: str | None = None
    parameters: tuple[str, ...] = ()
    step: int | None = None
    op: str | None = None
    source: str | None = None
    cause: str | None = None
    facts: Mapping[str, Fact] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Numbers in an order: a curve over training steps, or one number for each module.

    It is shown and decides nothing; the measurements do.

    Attributes:
        name: `loss`, `gradient-norm`, `clipped-norm`, `loss-scale`, `bits`, `error`, `composed`.
        unit: `nats`, `bits`, `roundoffs`, …
        along: what `at` counts.
        at: steps from 1 (the loss has one more, after the last step), or dotted names of modules.
        values: one for each of `at`; NaN and infinities are kept.
        groups: of modules, the role of each (`norm`, `rotary`, `linear`, `embedding`, `attention`, `mlp`, `block`,
            `other`); empty for steps.
        budgets: for each point the name of the measurement whose budget judges it, empty for a point without; no names
            at all where nothing judges any point.
        limits: of these budgets, None for a point that nothing judges; filled in by judging, as long as `budgets`.
    """

    name: str
    unit: str
    along: Literal["step", "module"]
    at: tuple[int | str, ...]
    values: tuple[float, ...]
    groups: tuple[str, ...] = ()
    budgets: tuple[str, ...] = ()
    limits: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what is not one entry for each point.

        Raises:
            ValueError: naming the series.
        """
        told = (self.groups, self.budgets, self.limits)
        if any(len(part) != len(self.at) for part in (self.values, *(part for part in told if part))):
            message = f"series {self.name}: {len(self.at)} places and not as many values, groups, budgets or limits"
            raise ValueError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The most that a measurement may be, with the reason.

    Attributes:
        measurement: name of the measurement it judges.
        limit: the largest value that passes; 0 is a limit.
        cause: what it means to be over it, unless the measurement knows better.
        title: one line for the finding; `{value}`, `{limit}`, `{module}`, `{parameters}`, `{step}` are filled in,
            and `{facts[NAME]}`.
        reason: where the limit comes from and what being over it means for the user; one paragraph.
        remedies: names of the remedies that apply, cheapest first.
    """

    check: str
    measurement: str
    limit: float
    cause: str
    title: str
    reason: str
    remedies: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A cure: applicable, and where it was tried on a copy, whether it worked.

    Attributes:
        name: of the contract, or another package's.
        description: what the user does, in a line.
        verified: whether it worked; None where it could not be tried.
        effect: what was seen, or why it was not tried.
        together: the other remedies that it was tried with, and without which it was not verified; `with` in a results file.
    """

    name: str
    description: str
    verified: bool | None = None
    effect: str = ""
    together: tuple[str, ...] = field(default=(), metadata={"json": "with"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A measurement over its budget, with cause and evidence; the fields are CONTRACT.md's.

    `consequence_of` is the id of the result (`load.head-init/glm4-tiny/bf16/sdpa/cpu`) whose finding is the root of this one, None for a root.
    """

    cause: str
    title: str
    explanation: str
    module: str | None = None
    op: str | None = None
    source: str | None = None
    step: int | None = None
    parameters: tuple[str, ...] = ()
    evidence: Mapping[str, Fact] = field(default_factory=dict)
    batch: Mapping[str, Any] | None = None
    remedies: tuple[Remedy, ...] = ()
    reproducer: str | None = None
    consequence_of: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """What one check said of one cell.

    `series` are of the batch that measured worst. `bad_input` is an error because no model can be loaded of the subject's files.
    """

    check: str
    cell: Cell = field(metadata={"json": ""})
    status: Status
    duration_s: float = 0.0
    reason: str | None = None
    measurements: Mapping[str, float] = field(default_factory=dict)
    finding: Finding | None = None
    series: tuple[Series, ...] = ()
    bad_input: bool = False

    @property
    def id(self) -> str:
        """`forward.finite/glm4-tiny/bf16/sdpa/cpu`."""
        return f"{self.check}/{self.cell.id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectFacts:
    """The facts about a subject that a results file carries."""

    id: str
    source: str
    revision: str | None
    family: str
    model_class: str | None
    task: str
    parameters: int | None
    stored_dtype: str | None
    digest: str | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """Everything that one run of `check` found; every printer is a function of it.

    Attributes:
        command: the command of the contract, `check`.
        started_at: RFC 3339 with the offset.
        environment: python, platform, device, packages.
        notes: lines a person should see above the verdict (an accept entry that matched nothing, a time limit).
        rehearsals: with `--data`, training tried on the user's own texts.
        complete: the run came to its end, so that every planned question has its entry; without it the verdict is `error`.
    """

    command: str
    started_at: str
    duration_s: float
    verdict: Literal["pass", "fail", "error"]
    environment: Mapping[str, Any]
    settings: Mapping[str, Any]
    subjects: tuple[SubjectFacts, ...]
    checks: tuple[CheckResult, ...]
    notes: tuple[str, ...] = ()
    exit_status: int = 0
    rehearsals: tuple[Rehearsal, ...] = field(default=(), metadata={"json": "rehearsal"})
    complete: bool = True

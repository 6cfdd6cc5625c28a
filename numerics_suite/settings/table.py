"""The one table of options: command line, pytest options and pyproject.toml are all made from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from numerics_suite.settings import parsers
from numerics_suite.settings.choices import ATTENTIONS, EFFORTS, OPTIMIZERS, PRECISIONS, TASKS

if TYPE_CHECKING:
    from collections.abc import Callable

Form = Literal["value", "list", "repeat", "flag", "switch"]
"""`list` is comma separated, `repeat` is given several times, `flag` turns on, `switch` has a `--no-` twin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option, under each of its names.

    Attributes:
        name: the field of `Settings`.
        help: one line.
        default: the value where it is not set.
        parse: one text to its value; raises ValueError with the reason.
        form: how it is given.
        flags: on the command line; empty for one that the command line lacks, SUBJECT for the positional.
        twin: under pytest.
        shown: whether `pytest --help` lists the twin; where pytest has an option of its own, that one is listed.
        key: in `[tool.numerics-suite]`, None where it has no place there.
        metavar: what stands for the value in `--help`.
        group: heading in `--help`.
        path: the value is a path, which pyproject.toml gives relative to its own folder.
    """

    name: str
    help: str
    default: Any = None
    parse: Callable[[str], Any] = parsers.text
    form: Form = "value"
    flags: tuple[str, ...]
    twin: str
    shown: bool = True
    key: str | None
    metavar: str | None = None
    group: str = "what is run"
    path: bool = False

    @property
    def many(self) -> bool:
        """Whether the value is a tuple."""
        return self.form in {"list", "repeat"}


def _option(name: str, help: str, **changes: Any) -> Option:  # noqa: A002 - argparse's own word
    """An option whose flag, twin and key follow from its name unless `changes` says otherwise."""
    dashed = name.replace("_", "-")
    named = {"flags": (f"--{dashed}",), "twin": f"--numerics-{dashed}", "key": dashed}
    return Option(name=name, help=help, **{**named, **changes})


def _flag(name: str, help: str, **changes: Any) -> Option:  # noqa: A002 - as above
    """An option that is off until it is given."""
    return _option(name, help, **{"form": "flag", "default": False, "parse": parsers.switch, **changes})


TRAIN, INPUT, OUTPUT = "training", "inputs", "output and limits"

OPTIONS: tuple[Option, ...] = (
    _option(
        "subjects",
        "directory, org/name[@revision], fixture:NAME or factory:module:function; none: the shipped fixtures",
        form="repeat",
        default=(),
        flags=("SUBJECT",),
        twin="--numerics-subject",
        metavar="SUBJECT",
    ),
    _option(
        "names",
        "the subject's name in ids and reports; give it once per SUBJECT, in their order",
        form="repeat",
        default=(),
        parse=parsers.name,
        flags=("--name",),
        twin="--numerics-name",
        metavar="NAME",
    ),
    _option(
        "task",
        "auto (from the checkpoint), causal-lm, sequence-classification or token-classification",
        default="auto",
        parse=parsers.one_of("task", TASKS),
        metavar="TASK",
    ),
    _option(
        "num_labels",
        "labels of a new head (default: the config's, else 2)",
        parse=parsers.integer(1),
        metavar="K",
    ),
    _option(
        "layers",
        "first:N or every:N: check a shallower model, made of the first N layers or of each Nth (default: all layers)",
        parse=parsers.layers,
        metavar="WHICH",
    ),
    _option(
        "precision",
        f"of {', '.join(PRECISIONS)} (default: what the device runs well)",
        form="list",
        parse=parsers.one_of("precision", PRECISIONS),
        metavar="LIST",
    ),
    _option(
        "attn",
        f"of {', '.join(ATTENTIONS)} (default: eager,sdpa)",
        form="list",
        default=("eager", "sdpa"),
        parse=parsers.one_of("attention implementation", ATTENTIONS),
        metavar="LIST",
    ),
    _option(
        "device",
        "auto, cpu, cuda[:N], mps, … or any kind that torch sees; cuda:0,cuda:1 spreads a model (default: auto)",
        default="auto",
        parse=parsers.device,
        metavar="DEVICE",
    ),
    _option(
        "require_device", "end with exit 4 where this kind of device is missing", parse=parsers.device, metavar="KIND"
    ),
    _option(
        "checks",
        "only the checks that match, as in 'forward.*,load.head-init'",
        form="list",
        default=(),
        parse=parsers.check_glob,
        metavar="GLOBS",
    ),
    _option(
        "skip", "all checks but those that match", form="list", default=(), parse=parsers.check_glob, metavar="GLOBS"
    ),
    _option(
        "extensions",
        "use what other packages add: checks, families, remedies, reporters (default: on)",
        form="switch",
        default=True,
        parse=parsers.switch,
    ),
    _flag("trust_remote_code", "run the model code that comes with a checkpoint"),
    _flag("allow_pickle", "read pickled weights (*.bin) too, which can run any code; default: safetensors only"),
    _option("steps", "optimizer steps (default: 5)", default=5, parse=parsers.integer(1), metavar="N", group=TRAIN),
    _option(
        "optimizer",
        "adamw, adam or sgd (default: adamw)",
        default="adamw",
        parse=parsers.one_of("optimizer", OPTIMIZERS),
        metavar="NAME",
        group=TRAIN,
    ),
    _option("lr", "learning rate (default: 1e-4)", default=1e-4, parse=parsers.positive, metavar="RATE", group=TRAIN),
    _option(
        "max_grad_norm",
        "clip the total gradient norm to this (default: no clipping)",
        parse=parsers.positive,
        metavar="NORM",
        group=TRAIN,
    ),
    _option(
        "train_scope",
        "auto (what fits in memory), full, head, last:K or lora",
        default="auto",
        parse=parsers.train_scope,
        metavar="SCOPE",
        group=TRAIN,
    ),
    _option(
        "effort",
        "quick, standard or thorough: how many batches and how long, from the model's size (default: standard)",
        default="standard",
        parse=parsers.one_of("effort", EFFORTS),
        metavar="EFFORT",
        group=INPUT,
    ),
    _option(
        "max_examples",
        "batches that Hypothesis draws per check (default: --effort's, 10 for a small model)",
        default=10,
        parse=parsers.integer(1),
        metavar="N",
        group=INPUT,
    ),
    _option(
        "seed",
        "same seed, same batches; another seed, others (default: 0)",
        default=0,
        parse=parsers.integer(0, parsers.LARGEST_SEED),
        metavar="S",
        group=INPUT,
    ),
    _option(
        "batch_size",
        "rows of a training batch (default: 4)",
        default=4,
        parse=parsers.integer(1),
        metavar="B",
        group=INPUT,
    ),
    _option(
        "seq_len",
        "the longest row in tokens, at least 2 (default: 64, and fewer above 4 million parameters)",
        default=64,
        parse=parsers.integer(2),
        metavar="L",
        group=INPUT,
    ),
    _option(
        "data",
        "your own .jsonl ('text' and 'label', 'prompt' and 'completion', or 'messages'): a sample joins the drawn batches",
        metavar="FILE",
        group=INPUT,
        path=True,
    ),
    _option("baseline", "folder of baselines (default: .numerics/baselines where it exists)", metavar="DIR", path=True),
    _option(
        "diagnose",
        "locate a finding, name its cause and its remedies (default: on)",
        form="switch",
        default=True,
        parse=parsers.switch,
        group=OUTPUT,
    ),
    _option(
        "report",
        "write a report here: index.html, and junit.xml, results.sarif, summary.md and comment.md for CI",
        metavar="DIR",
        group=OUTPUT,
        path=True,
    ),
    _option("junitxml", "write a JUnit file", metavar="FILE", group=OUTPUT, shown=False, key=None, path=True),
    _option(
        "json",
        "write the results file; '-' is standard output, and nothing else goes there",
        metavar="FILE",
        group=OUTPUT,
        key=None,
        path=True,
    ),
    _flag("quiet", "print the verdict and the titles of findings only", group=OUTPUT, shown=False, key=None),
    _option(
        "workers",
        "worker processes: auto, or a number; 0 is none (default: auto)",
        default="auto",
        parse=parsers.workers,
        flags=("-n", "--workers"),
        metavar="WORKERS",
        group=OUTPUT,
        shown=False,
    ),
    _flag(
        "list_only",
        "print the planned cells with the memory and time that each may need, and run none",
        flags=("--list",),
        twin="--numerics-list",
        shown=False,
        key=None,
        group=OUTPUT,
    ),
    _option(
        "max_time",
        "begin no cell after this many seconds; exit 5 if any was left",
        parse=parsers.positive,
        metavar="SECONDS",
        group=OUTPUT,
    ),
    _option(
        "resume",
        "reuse the answers of a results file that has not all of them; exit 4 where anything that can change one differs",
        metavar="FILE",
        group=OUTPUT,
        key=None,
        path=True,
    ),
    _flag("allow_partial", "with --max-time: what was left out does not fail the run", group=OUTPUT),
    _flag("collect", "a bare `pytest` collects the suite too", flags=()),
    _flag("allow_no_gpu", "let `pytest -m gpu` pass where no accelerator is visible", flags=(), key=None),
)
"""Every option of `check`, in the order of `--help`."""

BY_NAME = {option.name: option for option in OPTIONS}
BY_KEY = {option.key: option for option in OPTIONS if option.key is not None}

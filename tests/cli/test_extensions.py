"""The example of tests/extension as its user runs it: installed beside the suite, named nowhere, and part of everything."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from preloaded import python
from safetensors.torch import load_file, save_file
from unit.extensions_on_path import install_example, write_extension

import numerics_suite
from numerics_suite.reports.results import load_schema
from numerics_suite.settings.options import from_command_line
from numerics_suite.subjects.fixtures import fixture_path
from numerics_suite.versions.fingerprints import know_all
from numerics_suite.versions.job import RESULTS, for_a_cell
from numerics_suite.versions.jobs import Jobs, RunningEnvironment
from numerics_suite.versions.matrix import MatrixPlan

CELL = ("--precision", "bf16", "--attn", "sdpa", "-n", "0")
INSTALLED = Path(numerics_suite.__file__).parents[1]

DEFECT = """
from torch.nn.functional import silu
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

class Swapped(LlamaMLP):
    def forward(self, x):
        return self.down_proj(silu(self.up_proj(x)) * self.gate_proj(x))

def make():
    model = LlamaForCausalLM.from_pretrained("tiny-llama")
    for layer in model.model.layers:
        layer.mlp.__class__ = Swapped
    return model
"""


pytestmark = pytest.mark.xdist_group("extensions")  # what the module's fixtures install and run is shared


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands run: with a checkpoint whose logits are 64 times too large, and a tiny Llama."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(fixture_path("glm4-tiny"), folder / "coarse")
    weights = load_file(folder / "coarse" / "model.safetensors")
    weights["lm_head.weight"] *= 64
    save_file(weights, folder / "coarse" / "model.safetensors", metadata={"format": "pt"})
    write_llama(folder / "tiny-llama")
    (folder / "defect.py").write_text(DEFECT, encoding="utf-8")
    return folder


def write_llama(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """`PYTHONPATH` with the example on it."""
    return install_example(tmp_path_factory.mktemp("site"))


def run(
    folder: Path, path: list[str], *command: str, program: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "NUMERICS_SUITE_EXTENSIONS"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(INSTALLED), *path, str(folder)]), "PYTEST_ADDOPTS": ""}
    return subprocess.run(
        [program or python(), "-m", *command],
        cwd=folder, env=environment | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def checked(folder, path):
    """Sound and unsound models under the added check, and under the definition that an added family brings."""
    subjects = ("fixture:glm4-tiny", "coarse", "tiny-llama", "factory:defect:make")
    named = ("--name", "sound", "--name", "coarse", "--name", "llama", "--name", "swapped")
    done = run(
        folder, path, "numerics_suite", "check", *subjects, *named, "--checks", "acme.*,reference.oracle", *CELL,
        "--json", "out.json", "--report", "report",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    results = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    jsonschema.validate(results, load_schema())
    return done, results, {(check["check"], check["subject"]): check for check in results["checks"]}


def test_what_took_part_is_told(checked):
    done, results, _ = checked
    assert "extensions  acme-numerics 1.0.0" in done.stdout
    assert results["environment"]["extensions"] == {"acme-numerics": "1.0.0"}
    assert results["settings"]["extensions"] is True


def test_the_check_passes_on_a_sound_model(checked):
    _, _, checks = checked
    sound = checks["acme.logit-spacing", "sound"]
    assert (sound["status"], sound["measurements"]["examples"]) == ("passed", 10)
    assert 0 < sound["measurements"]["spacing"] < 0.5


def test_the_check_finds_its_defect_names_its_cause_and_its_remedy_is_seen_to_work(checked):
    done, _, checks = checked
    found = checks["acme.logit-spacing", "coarse"]["finding"]
    assert (found["cause"], found["module"]) == ("acme.coarse-logits", "lm_head")
    assert found["title"].startswith("logits of bfloat16 are 1 apart at the largest, ")
    assert found["batch"]["input_ids"]["shape"] == [1, 1], "the smallest batch that shows it"
    assert [(remedy["name"], remedy["verified"]) for remedy in found["remedies"]] == [
        ("acme.float32-head", True),
        ("keep-in-fp32", False),
    ]
    words = " ".join(done.stdout.split())
    assert "compute the head in float32 and leave its logits there" in words
    assert "tried, works: " in words


def test_the_family_is_chosen_by_model_type_and_its_definition_judges(checked):
    _, results, checks = checked
    assert {subject["id"]: subject["family"] for subject in results["subjects"]} == {
        "sound": "glm4",
        "coarse": "glm4",
        "llama": "llama",
        "swapped": "llama",
    }
    assert checks["reference.oracle", "llama"]["status"] == "passed"
    swapped = checks["reference.oracle", "swapped"]
    assert (swapped["status"], swapped["finding"]["cause"]) == ("failed", "semantic-error")
    assert swapped["finding"]["module"] == "model.layers.0.mlp"


def test_the_reporter_writes_beside_ours(checked, folder, path):
    rows = (folder / "report" / "checks.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + 8
    assert any(row.startswith("check,acme.logit-spacing,coarse,causal-lm,bf16,sdpa,cpu,failed,acme.") for row in rows)
    again = run(folder, path, "numerics_suite", "report", "out.json", "--out", "again")
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == str(Path("again") / "checks.csv")
    assert len((folder / "again" / "checks.csv").read_text(encoding="utf-8").splitlines()) == len(rows)
    assert "acme.coarse-logits" in (folder / "again" / "index.html").read_text(encoding="utf-8")
    off = run(folder, path, "numerics_suite", "report", "out.json", "--out", "off", "--no-extensions")
    assert off.returncode == 0, off.stderr
    assert not (folder / "off" / "checks.csv").exists()
    assert (folder / "off" / "index.html").exists()


def test_a_broken_reporter_is_told_before_anything_is_written(checked, folder, tmp_path):
    write_extension(tmp_path, {"numerics_suite.reporters": {"csv": "nowhere:VALUE"}})
    done = run(folder, [str(tmp_path)], "numerics_suite", "report", "out.json", "--out", "broken")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (4, "", 1)
    assert "entry point 'csv' of numerics_suite.reporters: nowhere:VALUE cannot be loaded" in done.stderr
    assert not (folder / "broken").exists()


def test_an_added_remedy_is_tried_for_a_cause_of_ours(folder, path):
    shutil.copytree(folder / "coarse", folder / "hot")
    weights = load_file(folder / "hot" / "model.safetensors")
    weights["lm_head.weight"] *= 600
    save_file(weights, folder / "hot" / "model.safetensors", metadata={"format": "pt"})
    command = ("numerics_suite", "check", "hot", "--checks", "forward.finite", "--precision", "fp16", *CELL[2:])
    done = run(folder, path, *command, "--json", "hot.json")
    assert done.returncode == 1, done.stderr
    (check,) = json.loads((folder / "hot.json").read_text(encoding="utf-8"))["checks"]
    tried = {remedy["name"]: remedy["verified"] for remedy in check["finding"]["remedies"]}
    assert check["finding"]["cause"] == "overflow"
    assert (tried["acme.float32-head"], tried["keep-in-fp32"]) == (True, False)


@pytest.mark.slow
def test_under_pytest_the_check_is_an_item_like_any_other_also_in_workers(folder, path):
    named = ("--numerics-subject", "fixture:glm4-tiny", "--numerics-precision", "bf16", "--numerics-attn", "sdpa,eager")
    suite = ("pytest", "--pyargs", "numerics_suite.suite", "-p", "no:cacheprovider", "-v", *named)
    done = run(folder, path, *suite, "-n", "2", "--numerics-checks", "acme.*", "--numerics-json", "items.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_extensions.py::test_extensions[acme.logit-spacing-glm4-tiny-bf16-sdpa-cpu]" in done.stdout
    results = json.loads((folder / "items.json").read_text(encoding="utf-8"))
    assert [check["id"] for check in results["checks"]] == [
        "acme.logit-spacing/glm4-tiny/bf16/sdpa/cpu",
        "acme.logit-spacing/glm4-tiny/bf16/eager/cpu",
    ]
    off = run(folder, path, *suite, "--numerics-checks", "load.dtype,acme.*", "--numerics-no-extensions")
    assert off.returncode == 4
    assert "only checks of other packages match it, and extensions are off" in off.stdout + off.stderr


@pytest.mark.slow
def test_in_an_environment_of_another_version_it_takes_no_part_though_it_is_on_the_path(tmp_path, path, monkeypatch):
    monkeypatch.delenv("NUMERICS_SUITE_EXTENSIONS")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    left_out = (
        "inputs.*,forward.*,reference.*,train.*,baseline.*,load.c*,load.dtype,load.head-init,load.roundtrip,load.tied"
    )
    given = {"subjects": ["fixture:glm4-tiny"], "precision": "bf16", "attn": "sdpa", "skip": left_out}
    settings = for_a_cell(from_command_line(given, tmp_path))
    job = MatrixPlan(settings=settings, known=know_all(settings), cells=(), cwd=tmp_path, threads=1, record=False).job(
        None
    )
    done = Jobs().run(RunningEnvironment(), job, tmp_path)
    assert done["status"] == "passed", done
    results = json.loads((tmp_path / RESULTS).read_text(encoding="utf-8"))
    assert [check["check"] for check in results["checks"]] == ["load.finite"]
    assert results["environment"]["extensions"] == {}


@pytest.mark.parametrize(
    ("group", "arguments"),
    [("checks", ("--checks", "acme.*")), ("families", ()), ("remedies", ())],
)
def test_a_broken_extension_is_one_line_and_exit_4_before_anything_runs(tmp_path, group, arguments):
    write_extension(tmp_path / "site", {f"numerics_suite.{group}": {"acme.mine": "nowhere:VALUE"}})
    command = ("numerics_suite", "check", "fixture:glm4-tiny", *arguments, *CELL, "--json", "out.json")
    done = run(tmp_path, [str(tmp_path / "site")], *command)
    assert (done.returncode, done.stdout) == (4, ""), done.stderr
    assert done.stderr == (
        f"numerics-suite: error: extension acme-numerics 1.0.0: entry point 'acme.mine' of numerics_suite.{group}: "
        "nowhere:VALUE cannot be loaded: ModuleNotFoundError: No module named 'nowhere'; repair or uninstall it, or "
        "leave all extensions out with --no-extensions (NUMERICS_SUITE_EXTENSIONS=off)\n"
    )
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    "command",
    [
        "from numerics_suite.cli.main import main; main(['--help'])",
        "from numerics_suite.cli.main import main; main(['check', '--help'])",
        "from numerics_suite.settings.options import from_command_line; from_command_line({'checks': 'load.*'})",
    ],
)
def test_nothing_is_looked_up_where_nothing_of_it_is_asked(folder, path, command):
    seen = "print('SEEN', *sorted({'importlib.metadata', 'acme_numerics'} & set(sys.modules)))"
    (folder / "start.py").write_text(f"import sys\n{command}\n{seen}\n", encoding="utf-8")
    done = run(folder, path, "start", program=sys.executable)  # in which nothing is imported yet
    assert done.stdout.splitlines()[-1] == "SEEN", done.stdout + done.stderr

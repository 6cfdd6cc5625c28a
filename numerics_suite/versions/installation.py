"""Install a recipe's packages into a new folder, and see that they can be imported there."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.version import Version

from numerics_suite.core.errors import BadInputError, UnsupportedError
from numerics_suite.versions.commits import export
from numerics_suite.versions.installers import install, make_venv, out_of_space, run_quietly
from numerics_suite.versions.recipes import base_interpreter

if TYPE_CHECKING:
    from numerics_suite.versions.recipes import Recipe, Wanted

_IMPORT = """
import json, platform, sys
import importlib.metadata
versions = {"python": platform.python_version()}
for name in sys.argv[1:]:
    versions[name] = importlib.metadata.version(name)
for name in ("torch", "transformers"):
    try:
        versions[name] = __import__(name).__version__
    except BaseException as error:
        last = (str(error).strip() or "no message").splitlines()[-1]
        print(f"\\n{name} {type(error).__name__}: {last}", file=sys.stderr)
        sys.exit(9)
# The rest is compiled too, so that the first cell starts as fast as the second; a release may lack some of it.
for name in ("transformers.models.glm.modeling_glm", "transformers.models.glm4.modeling_glm4", "transformers.models.auto.modeling_auto",
             "transformers.generation.utils", "torch.utils.checkpoint", "accelerate", "peft", "hypothesis", "pytest", "xdist", "safetensors.torch", "rich"):
    try:
        __import__(name)
    except Exception:
        pass
print(json.dumps(versions))
"""


def build(recipe: Recipe, wanted: Wanted, folder: Path) -> Path:
    """Make a virtual environment in the folder and install everything.

    Returns:
        The environment's interpreter.

    Raises:
        UnsupportedError: something cannot be installed; the message is the reason.
        BadInputError: uv is missing, or the disk is full.
    """
    venv = folder / "venv"
    here = recipe.python == ".".join(map(str, sys.version_info[:3])) or recipe.python == sys.version.split()[0]
    make_venv(venv, base_interpreter() if here else recipe.python)
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    source = folder / "transformers"
    if wanted.transformers_source is not None:
        repository, commit = wanted.transformers_source, str(wanted.transformers_commit)
        refusal = f"commit {commit} of {repository} cannot be read"
        export(repository, commit, ".", source, refusal=refusal)
        transformers = f"transformers @ {source.absolute().as_uri()}"
    else:
        transformers = f"transformers=={recipe.transformers}"
    install(python, [transformers, f"torch=={recipe.torch}", *recipe.requirements], recipe.sources, recipe.title)
    return python


def import_once(python: Path, recipe: Recipe) -> dict[str, str]:
    """Import torch and transformers there: it works, and their bytecode is compiled.

    Returns:
        Versions of `python`, `torch` and `transformers` as imported.

    Raises:
        UnsupportedError: they cannot be imported, or are not what was asked for.
        BadInputError: the disk is full.
    """
    unwanted = ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "VIRTUAL_ENV")
    variables = {name: value for name, value in os.environ.items() if name not in unwanted}
    variables |= {"PYTHONNOUSERSITE": "1", "HF_HUB_OFFLINE": "1"}
    status, output, complaint = run_quietly(
        [str(python), "-c", _IMPORT, *(name for name, _ in recipe.others)], variables, cwd=str(python.parent)
    )
    if status != 0:
        raise _import_refusal(status, complaint, recipe)
    versions: dict[str, str] = json.loads(output.splitlines()[-1])
    for name, wanted in (("torch", recipe.torch), ("transformers", recipe.transformers), *recipe.others):
        if not wanted.startswith("git-") and Version(versions[name]).public != Version(wanted).public:
            message = f"{name} {wanted} was installed and {versions[name]} is imported"
            raise UnsupportedError(message)
    return versions


def _import_refusal(status: int, complaint: str, recipe: Recipe) -> Exception:
    if out_of_space(complaint):
        return BadInputError("the disk is full; numerics-suite cache clean makes room")
    last = (complaint.strip().splitlines() or [""])[-1]
    if status < 0:
        return UnsupportedError(f"{recipe.title} cannot be imported: the process was ended by signal {-status}")
    name, _, reason = last.partition(" ")
    version = {"torch": recipe.torch, "transformers": recipe.transformers}.get(name, "")
    return UnsupportedError(f"{name} {version} cannot be imported: {reason}"[:400])

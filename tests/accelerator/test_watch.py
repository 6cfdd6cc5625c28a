"""The watch on the stand-in: late copies, several devices, another default device; its bundle replays anywhere."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from accelerator.checking import DEVICE, STANDIN, environment
from preloaded import python


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the watch caught on the stand-in, after all its other assertions held."""
    folder = tmp_path_factory.mktemp("watched") / "bundle"
    script = Path(__file__).with_name("watched.py")
    done = subprocess.run(
        [python(str(STANDIN)), str(script), str(folder)], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["done"], done.stderr[-3000:]
    return folder


def test_figures_are_read_when_they_have_arrived_and_a_spread_model_is_watched(bundle: Path) -> None:
    assert (bundle / "bundle.json").exists() or list(bundle.glob("*.json"))


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), DEVICE])
def test_a_bundle_caught_on_one_device_replays_on_another(bundle: Path, tmp_path: Path, device: str) -> None:
    out = tmp_path / "out.json"
    command = [
        python(str(STANDIN)),
        "-m",
        "numerics_suite",
        "check",
        "factory:accelerator.loud:make",
        "--bundle",
        str(bundle),
    ]
    arguments = ["--device", device, "--json", str(out), "--quiet", "--no-diagnose"]
    done = subprocess.run(
        [*command, *arguments], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    (result,) = json.loads(out.read_text(encoding="utf-8"))["checks"]
    assert result["device"] == device
    assert result["finding"]["cause"] == "overflow"

"""SPEC and the user's package sources: pip and uv themselves are asked, against an index made of files."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from packaging.version import Version
from unit.package_index import only_from, write_index, write_wheel

from numerics_suite.core.errors import BadInputError
from numerics_suite.versions import index
from numerics_suite.versions.installers import source_options
from numerics_suite.versions.pip_settings import package_sources
from numerics_suite.versions.specs import choose

KNOWN = [
    Version(text) for text in ("1.0.0", "1.0.1", "1.1.0", "1.2.0", "1.2.3", "1.10.0", "2.0.0rc1", "2.0.0", "2.1.0.dev1")
]


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder of wheels that is all there is."""
    folder = tmp_path / "wheels"
    for version in ("1.0.0", "1.9.0", "1.10.0", "2.0.0rc1", "1.10.1+cpu"):
        write_wheel(folder, "tiny-package", version)
    only_from(monkeypatch, folder, tmp_path)
    monkeypatch.chdir(tmp_path)
    return folder


def texts(versions):
    return [str(version) for version in versions]


def test_a_folder_of_wheels_is_sorted_by_version_and_without_builds(wheels):
    assert texts(index.released("tiny-package")) == ["1.0.0", "1.9.0", "1.10.0", "1.10.1"]


def test_pre_releases_only_where_asked_for(wheels):
    assert texts(index.released("tiny-package", pre=True))[-1] == "2.0.0rc1"


@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_an_index_of_files_without_its_yanked_releases(tmp_path, monkeypatch, tool):
    folder = tmp_path / "files"
    found = [write_wheel(folder, "tiny-package", version) for version in ("1.0", "1.1", "1.2")]
    address = write_index(tmp_path / "simple", "tiny-package", found, yanked=("1.1",))
    only_from(monkeypatch, tmp_path / "empty", tmp_path)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL" if tool == "pip" else "UV_DEFAULT_INDEX", address)
    assert texts(index.released("tiny-package")) == ["1.0", "1.2"]


def test_an_extra_index_adds_to_the_main_one(tmp_path, monkeypatch):
    only_from(monkeypatch, tmp_path / "empty", tmp_path)
    main = write_index(tmp_path / "a", "tiny-package", [write_wheel(tmp_path / "f", "tiny-package", "1.0")])
    extra = write_index(tmp_path / "b", "tiny-package", [write_wheel(tmp_path / "f", "tiny-package", "3.0")])
    monkeypatch.delenv("PIP_NO_INDEX")
    settings = tmp_path / "pip.conf"
    settings.write_text(f"[global]\nindex-url = {main}\nextra-index-url =\n    {extra}\n", encoding="utf-8")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(settings))
    assert texts(index.released("tiny-package")) == ["1.0", "3.0"]
    assert source_options(package_sources())[:4] == ["--default-index", main, "--index", extra]
    assert "unsafe-best-match" in source_options(package_sources())


def test_an_unknown_package_is_one_line(wheels):
    with pytest.raises(BadInputError, match=r"^no index or folder of wheels has a release of other-package"):
        index.released("other-package")


def test_an_index_out_of_reach_is_said_and_names_are_taken_as_they_are(tmp_path, monkeypatch, wheels):
    """Half a list would make `latest` another release than it is; a name may be in uv's cache."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(BadInputError, match=r"^no network: http://127\.0\.0\.1:9/simple/tiny-package/ cannot be asked"):
        index.resolve("tiny-package", "latest:2")
    assert index.resolve("tiny-package", "1.9.0,1.0.0") == ["1.0.0", "1.9.0"]


def test_pip_from_uv_where_the_environment_has_none(wheels, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else object())
    assert index._pip()[1:] == [
        "--color", "never", "--no-progress", "run", "--isolated", "--no-project", "--python", sys.executable,
        "--with", "pip", "python", "-m", "pip",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("1.2.3,1.0.0", ["1.0.0", "1.2.3"]),
        (" 1.0 ", ["1.0"]),
        ("2.0.0rc1", ["2.0.0rc1"]),
        (">=1.1,<2", ["1.1.0", "1.2.0", "1.2.3", "1.10.0"]),
        ("~=1.2.0", ["1.2.0", "1.2.3"]),
        ("==1.2.*", ["1.2.0", "1.2.3"]),
        ("!=2.0.0", ["1.0.0", "1.0.1", "1.1.0", "1.2.0", "1.2.3", "1.10.0"]),
        ("latest", ["2.0.0"]),
        ("latest:2", ["1.10.0", "2.0.0"]),
        ("latest:99", ["1.0.0", "1.0.1", "1.1.0", "1.2.0", "1.2.3", "1.10.0", "2.0.0"]),
        ("minors", ["1.0.1", "1.1.0", "1.2.3", "1.10.0", "2.0.0"]),
        ("minors:>=1.2", ["1.2.3", "1.10.0", "2.0.0"]),
        ("latest; 1.0.0; ==1.2.*", ["1.0.0", "1.2.0", "1.2.3", "2.0.0"]),
    ],
)
def test_spec(spec, expected):
    assert texts(choose("p", spec, KNOWN)) == expected


def test_spec_with_pre_releases():
    assert texts(choose("p", "latest:2", KNOWN, pre=True)) == ["2.0.0", "2.1.0.dev1"]


@pytest.mark.parametrize(
    "spec", ["", "hello", "latest:0", "latest:x", "latest:-1", ">=", "1.0.0,", ">=1;x", "minors:x", "1.0.0 2.0.0"]
)
def test_a_malformed_spec_names_the_forms(spec):
    with pytest.raises(BadInputError, match=r"a list \(4\.51\.3,5\.23\.0\), a specifier \(>=4\.51,<6\) or latest:N"):
        choose("p", spec, KNOWN)


@pytest.mark.parametrize(
    ("spec", "nearest"), [("1.2.4", "1.2.3"), ("1.11", "1.10.0"), ("9.0.0", "2.0.0"), ("0.9", "1.0.0")]
)
def test_a_version_that_does_not_exist_names_the_nearest(spec, nearest):
    with pytest.raises(
        BadInputError, match=rf"^there is no p {re.escape(spec)} for this Python; the nearest is {re.escape(nearest)}$"
    ):
        choose("p", spec, KNOWN)


def test_a_spec_that_means_nothing_is_an_error():
    with pytest.raises(BadInputError, match=r"^no release of p is '>=9'$"):
        choose("p", ">=9", KNOWN)


def test_constraints_remove_what_they_forbid_but_not_what_is_named(tmp_path, monkeypatch, wheels):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("# a cap\ntiny_package < 1.10  # why\n--index-url x\nother==1\n", encoding="utf-8")
    monkeypatch.setenv("PIP_CONSTRAINT", str(constraints))
    assert index.resolve("tiny-package", "latest") == ["1.9.0"]
    assert index.last_patches("tiny-package", ">=1.0") == ["1.0.0", "1.9.0"]
    assert index.resolve("tiny-package", "1.10.0") == ["1.10.0"]


def test_results_are_kept_for_the_process(wheels, monkeypatch):
    index.released("tiny-package")
    monkeypatch.setattr(index, "_pip", lambda: pytest.fail("asked again"))
    index.released("tiny-package")


@pytest.fixture
def no_settings(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_")):
            monkeypatch.delenv(name)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "shared"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="writes the files where Linux has them")
@pytest.mark.parametrize("level", ["user", "shared"])
def test_settings_are_those_that_pip_itself_reads(no_settings, monkeypatch, level):
    """Every level: shared, user's, named by a variable (then the user's is not read), variables."""
    for path, text in (
        ("shared/pip/pip.conf", "[global]\nindex-url = https://shared/simple\nproxy = http://p:1\n"),
        ("pip/pip.conf", "[global]\nindex-url = https://user/simple\nfind_links = /a\n  /b\n[install]\npre = yes\n"),
        (
            "named.conf" if level == "shared" else ".pip/pip.conf",
            "[install]\nextra-index-url = https://x/simple https://y/simple\n",
        ),
    ):
        (no_settings / path).parent.mkdir(parents=True, exist_ok=True)
        (no_settings / path).write_text(text, encoding="utf-8")
    if level == "shared":
        monkeypatch.setenv("PIP_CONFIG_FILE", str(no_settings / "named.conf"))
    monkeypatch.setenv("PIP_TRUSTED_HOST", "x y")
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    for line in (
        f"global.index-url='https://{level}/simple'",
        "install.extra-index-url='https://x/simple https://y/simple'",
    ):
        assert line in listed
    assert ("install.pre='yes'" in listed) == (level == "user")
    sources = package_sources()
    assert sources.index_url == f"https://{level}/simple"
    assert sources.find_links == (("/a", "/b") if level == "user" else ())
    assert sources.extra_index_urls == ("https://x/simple", "https://y/simple")
    assert sources.trusted_hosts == ("x", "y")
    assert (sources.pre, sources.proxy, sources.no_index) == (level == "user", "http://p:1", False)


def test_what_uv_is_told_by_the_user_wins(no_settings, monkeypatch):
    (no_settings / "uv").mkdir()
    toml = 'find-links = ["/uv"]\n[[index]]\nname = "own"\nurl = "https://own/simple"\n[[index]]\nurl = "https://no"\nexplicit = true\n'
    (no_settings / "uv" / "uv.toml").write_text(toml, encoding="utf-8")
    monkeypatch.setenv("PIP_FIND_LINKS", "/pip")
    monkeypatch.setenv("PIP_INDEX_URL", "https://pip/simple")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "main=https://uv/simple")
    sources = package_sources()
    assert (sources.index_url, sources.find_links) == ("https://uv/simple", ("/uv",))
    assert sources.extra_index_urls == ("https://own/simple",)
    assert not source_options(sources)
    assert list(index._options(sources)) == [
        "--index-url", "https://uv/simple", "--extra-index-url", "https://own/simple", "--find-links", "/uv",
    ]  # fmt: skip


def test_a_settings_file_that_cannot_be_read_is_named(no_settings, monkeypatch):
    broken = no_settings / "broken.conf"
    broken.write_text("nonsense", encoding="utf-8")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(broken))
    with pytest.raises(BadInputError, match=r"broken\.conf cannot be read"):
        package_sources()

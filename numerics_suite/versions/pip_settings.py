"""Where may packages come from? The user's own settings of pip and uv, read and never written.

uv reads no pip.conf and pip no uv.toml, and people have one or the other. So each setting is looked up in uv's places first
(`UV_*`, uv.toml, `[tool.uv]`) and, where uv has none, in pip's; both tools are then told the same.

pip's files are read here and not by `pip config list`: that costs 0.4 s at every start, and the running environment may be
one without pip. Their places and their form (INI) are documented; a test compares the two where pip is there.
"""

from __future__ import annotations

import configparser
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numerics_suite.core.errors import BadInputError
from numerics_suite.settings.sources import read_toml

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

UV_VARIABLES = {
    "index_url": ("UV_DEFAULT_INDEX", "UV_INDEX_URL"),
    "extra_index_urls": ("UV_INDEX", "UV_EXTRA_INDEX_URL"),
    "find_links": ("UV_FIND_LINKS",),
    "constraints": ("UV_CONSTRAINT",),
    "no_index": ("UV_NO_INDEX",),
    "pre": ("UV_PRERELEASE",),
    "trusted_hosts": ("UV_INSECURE_HOST",),
    "cert": ("SSL_CERT_FILE",),
}
"""Variables that make uv know a setting by itself."""

UV_KEYS = {
    "index_url": "index-url",
    "extra_index_urls": "extra-index-url",
    "find_links": "find-links",
    "no_index": "no-index",
    "pre": "prerelease",
    "trusted_hosts": "allow-insecure-host",
}
PIP_KEYS = {
    "index_url": "index-url",
    "extra_index_urls": "extra-index-url",
    "find_links": "find-links",
    "constraints": "constraint",
    "no_index": "no-index",
    "pre": "pre",
    "trusted_hosts": "trusted-host",
    "cert": "cert",
    "proxy": "proxy",
}
FLAGS = frozenset({"no_index", "pre"})
SINGLE = frozenset({"index_url", "cert", "proxy"})


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageSources:
    """Where packages may come from, and which of them.

    Attributes:
        index_url: the main index; empty for the tool's own default.
        extra_index_urls: further indexes.
        find_links: folders or pages of wheels.
        constraints: files that say which versions are allowed.
        no_index: whether `find_links` alone is used.
        pre: whether pre-releases are wanted everywhere.
        trusted_hosts: hosts whose certificate is not asked for.
        cert: a bundle of certificates; empty for the system's.
        proxy: empty for the variables `HTTPS_PROXY`, ….
        known_to_uv: names of the attributes that uv has from its own settings.
    """

    index_url: str = ""
    extra_index_urls: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()
    no_index: bool = False
    pre: bool = False
    trusted_hosts: tuple[str, ...] = ()
    cert: str = ""
    proxy: str = ""
    known_to_uv: frozenset[str] = frozenset()


def package_sources() -> PackageSources:
    """The settings as they are now.

    Raises:
        BadInputError: a settings file cannot be read; the message names it.
    """
    pip, uv = _pip_settings(), _uv_settings()
    values: dict[str, Any] = {}
    for name, key in PIP_KEYS.items():
        raw = uv.get(name) or pip.get(key, "").split()
        if name in FLAGS:
            values[name] = bool(raw) and raw[0].lower() in {"1", "true", "yes", "on", "allow", "t", "y"}
        else:
            values[name] = (raw[-1] if raw else "") if name in SINGLE else tuple(dict.fromkeys(raw))
    return PackageSources(**values, known_to_uv=frozenset(uv))


def _pip_settings() -> dict[str, str]:
    """The settings of pip for `pip install`: later files over earlier ones, `[install]` over `[global]`, variables over files."""
    settings: dict[str, str] = {}
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}}
    for path in pip_files():
        for section, values in _read_ini(path).items():
            sections.setdefault(section, {}).update(values)
    settings |= sections["global"] | sections["install"]
    for name, value in os.environ.items():
        if name.startswith("PIP_") and value and name not in {"PIP_CONFIG_FILE", "PIP_VERSION"}:
            settings[name[4:].lower().replace("_", "-")] = value
    return settings


def _read_ini(path: Path) -> Mapping[str, dict[str, str]]:
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, configparser.Error) as error:
        message = f"pip's settings file {path} cannot be read: {str(error).splitlines()[0]}"
        raise BadInputError(message) from None
    return {
        section: {key.replace("_", "-"): value for key, value in parser.items(section)} for section in parser.sections()
    }


def pip_files() -> list[Path]:
    """The files of pip that are there, least important first."""
    own = os.environ.get("PIP_CONFIG_FILE", "")
    if own == os.devnull:
        return []
    named = bool(own) and Path(own).exists()
    user = [] if named else _user_files()  # pip reads the one file instead of the user's
    places = [*_global_files(), *user, Path(sys.prefix) / _pip_name(), *([Path(own)] if named else [])]
    return [path for path in places if path.is_file()]


def _pip_name() -> str:
    return "pip.ini" if sys.platform == "win32" else "pip.conf"


def _global_files() -> Iterator[Path]:
    if sys.platform == "win32":
        yield Path(os.environ.get("PROGRAMDATA", r"C:\ProgramData")) / "pip" / "pip.ini"
    elif sys.platform == "darwin":
        yield Path("/Library/Application Support/pip/pip.conf")
    else:
        folders = os.environ.get("XDG_CONFIG_DIRS") or "/etc/xdg"
        yield from (Path(folder) / "pip" / "pip.conf" for folder in folders.split(os.pathsep) if folder)
        yield Path("/etc/pip.conf")


def _user_files() -> Iterator[Path]:
    home = Path.home()
    if sys.platform == "win32":
        yield home / "pip" / "pip.ini"
        yield Path(os.environ.get("APPDATA", home)) / "pip" / "pip.ini"
        return
    yield home / ".pip" / "pip.conf"
    application_support = home / "Library" / "Application Support" / "pip"
    if sys.platform == "darwin" and application_support.is_dir():
        yield application_support / "pip.conf"
    else:
        yield Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip" / "pip.conf"


def _uv_settings() -> dict[str, list[str]]:
    """What uv knows by itself: settings files first, variables over them."""
    found: dict[str, list[str]] = {}
    for table in _uv_tables():
        found |= _of_table(table)
    for name, variables in UV_VARIABLES.items():
        given = [(variable, os.environ[variable]) for variable in variables if os.environ.get(variable)]
        if not given:
            continue
        found[name] = []
        for variable, value in given:
            items = value.split("," if variable == "UV_FIND_LINKS" else None)
            found[name] += [_without_name(item.strip()) if "INDEX" in variable else item.strip() for item in items]
    if found.get("no_index", [""])[0].lower() in {"0", "false", "no"}:
        found["no_index"] = ["false"]
    return found


def _without_name(index: str) -> str:
    """The address of uv's `name=https://…`."""
    name, equals, address = index.partition("=")
    return address if equals and "/" not in name and ":" not in name else index


def _of_table(table: Mapping[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for values in (table, table.get("pip", {})):
        for name, key in UV_KEYS.items():
            if values.get(key) not in (None, []):
                value = values[key]
                found[name] = [str(item) for item in value] if isinstance(value, list) else [str(value)]
    for index in table.get("index", ()):
        if not index.get("explicit"):
            found.setdefault("index_url" if index.get("default") else "extra_index_urls", []).append(str(index["url"]))
    return found


def _uv_tables() -> Iterator[Mapping[str, Any]]:
    """The settings tables of uv, least important first: the system's, the user's, the project's."""
    own = os.environ.get("UV_CONFIG_FILE")
    if own:
        yield read_toml(Path(own))
        return
    if os.environ.get("UV_NO_CONFIG"):
        return
    if sys.platform == "win32":
        shared, user = (
            Path(os.environ.get("PROGRAMDATA", r"C:\ProgramData")),
            Path(os.environ.get("APPDATA", Path.home())),
        )
    else:
        shared, user = Path("/etc"), Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    for path in (shared / "uv" / "uv.toml", user / "uv" / "uv.toml"):
        if path.is_file():
            yield read_toml(path)
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "uv.toml").is_file():
            yield read_toml(folder / "uv.toml")
            return
        if (folder / "pyproject.toml").is_file():
            table = read_toml(folder / "pyproject.toml").get("tool", {}).get("uv")
            if table is not None:
                yield table
                return

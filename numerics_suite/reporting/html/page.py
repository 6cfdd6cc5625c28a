"""The page: what the documents hold, put into the templates."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from numerics_suite import __version__
from numerics_suite.core.atomic import write_atomic
from numerics_suite.core.errors import BadInputError
from numerics_suite.reporting.html.assets import policy, scripts, style
from numerics_suite.reporting.html.cards import cards_of
from numerics_suite.reporting.html.formats import FILTERS, many
from numerics_suite.reporting.html.places import places_of
from numerics_suite.reporting.html.problems import problems_of
from numerics_suite.reporting.html.reproducers import Scripts
from numerics_suite.reporting.html.story import story_of

if TYPE_CHECKING:
    from numerics_suite.reporting.documents import Documents

TEMPLATES = Path(__file__).resolve().parent / "templates"
NAME = "index.html"


def write_html(folder: Path, documents: Documents) -> Path:
    """Write the report, whole or not at all.

    Args:
        folder: made where it is missing.
        documents: what the report tells of.

    Returns:
        The path of the file, `index.html` in the folder.

    Raises:
        BadInputError: it cannot be written; the message names the file.
    """
    text = render(documents)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"cannot make the folder {folder}: {error.strerror or error}"
        raise BadInputError(message) from None
    path = folder / NAME
    write_atomic(path, text)
    return path


def render(documents: Documents) -> str:
    """The report as the text of one HTML file that needs nothing beside it; the same text for the same documents.

    Args:
        documents: what the report tells of.
    """
    return _environment().get_template("page.html.j2").render(_context(documents))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    environment.globals["many"] = many
    return environment


def _context(documents: Documents) -> dict[str, Any]:
    places = places_of(documents)
    problems = problems_of(places)
    texts = scripts()
    return {
        "tool_version": __version__,
        "policy": policy(texts),
        # Package data alone is put in as it is; everything of the documents is escaped.
        "style": Markup(style()),  # noqa: S704
        "scripts": [Markup(text) for text in texts],  # noqa: S704
        "documents": documents,
        "story": story_of(documents, places, problems),
        "cards": cards_of(problems, Scripts()),
    }

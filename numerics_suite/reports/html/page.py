"""The page: what the documents hold, put into the templates."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from numerics_suite import __version__
from numerics_suite.core.atomic import write_atomic
from numerics_suite.core.errors import BadInputError
from numerics_suite.reports.comparison import MEANS
from numerics_suite.reports.html.assets import early, policy, scripts, style
from numerics_suite.reports.html.grid import grid_of
from numerics_suite.reports.html.timeline import LETTERS, tracks_of
from numerics_suite.reports.view.bisections import boundary_of
from numerics_suite.reports.view.cards import cards_of
from numerics_suite.reports.view.differences import differences_of
from numerics_suite.reports.view.formats import FILTERS, STATUSES, many
from numerics_suite.reports.view.overview import about, story_of
from numerics_suite.reports.view.places import places_of
from numerics_suite.reports.view.problems import group_rank, problems_of
from numerics_suite.reports.view.reproducers import Scripts
from numerics_suite.reports.view.sections import reasons_of, rehearsed, surroundings_of
from numerics_suite.reports.view.series import Chapters

if TYPE_CHECKING:
    from numerics_suite.reports.documents import Documents
    from numerics_suite.reports.html.timeline import Track
    from numerics_suite.reports.view.places import Places

CHAPTERS = (
    (
        "precision",
        "Rounding error by layer and module class",
        "Each module gets its real inputs, and its output is compared with float64 on these inputs. The dashed line is the most that "
        "a right program of that class needs.",
        Chapters.precision,
    ),
    (
        "headroom",
        "Headroom by layer",
        "Bits between the largest activation and the largest number of the dtype: each bit is a factor of two. At 0 it "
        "overflows.",
        Chapters.headroom,
    ),
    (
        "training",
        "Training",
        "A few steps in each precision; where something was not finite, the step is marked.",
        Chapters.training,
    ),
)
"""Anchor, title, introduction and figures of each chapter of plots."""

TEMPLATES = Path(__file__).resolve().parent / "templates"
NAME = "index.html"

_BETWEEN = re.compile(r">\s*\n\s*<")
"""Line breaks between two tags, which a browser would keep as so many pieces of text. No text holds one: its `<` is escaped."""


def write_html(folder: Path, documents: Documents) -> Path:
    """Write the report, whole or not at all.

    Args:
        folder: made where it is missing.
        documents: everything that the report covers.

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
    """The report as the text of one HTML file that needs no other; the same text for the same documents."""
    page = _environment().get_template("page.html.j2").render(_context(documents))
    shown, _, programs = page.partition("<!-- programs -->\n")
    return _BETWEEN.sub("><", shown) + programs


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
    cards = cards_of(problems, Scripts())
    chapters = Chapters(places)
    context: dict[str, Any] = {
        "tool_version": __version__,
        # Package data alone is put in as it is; everything of the documents is escaped.
        "style": Markup(style()),  # noqa: S704
        "early": Markup(early()),  # noqa: S704
        "story": story_of(documents, places, problems, cards),
        "about": about(documents),
        "notes": documents.every_note,
        "cards": cards,
        "grid": grid_of(places, problems),
        "filters": _filters(places),
        "statuses": STATUSES,
        "several_sources": len(places.sources) > 1,
        "several_tasks": len({place.result.cell.task for place in places.all}) > 1,
        "source_word": "version" if documents.matrices else "file",
        "timelines": [
            tracks_of(index, matrix, places.of_matrix(index)) for index, matrix in enumerate(documents.matrices)
        ],
        "kind_letters": LETTERS,
        "kind_means": MEANS,
        "chapters": [(anchor, title, lead, draw(chapters)) for anchor, title, lead, draw in CHAPTERS],
        "rehearsals": rehearsed(documents),
        "differences": [differences_of(item) for item in documents.comparisons],
        "bisections": [boundary_of(item) for item in documents.bisections],
        "errors": reasons_of(places, "error"),
        "skipped": reasons_of(places, "skipped"),
        "surroundings": surroundings_of(documents, places),
    }
    texts = scripts(plots=_plots(context))
    return context | {
        "kinds_seen": _kinds(context["timelines"]),
        "sections": _sections(context),
        "policy": policy((early(), *texts)),
        "scripts": [Markup(text) for text in texts],  # noqa: S704
    }


def _plots(context: dict[str, Any]) -> bool:
    """Something is drawn."""
    chapters = any(chapter.subjects for *_, chapter in context["chapters"])
    rehearsals = any(item.figures for item in context["rehearsals"])
    return chapters or rehearsals or any(entry.figure for item in context["differences"] for entry in item.entries)


def _filters(places: Places) -> list[tuple[str, list[str]]]:
    """What the filter offers, in the order in which it comes."""
    offered: dict[str, dict[str, None]] = {"status": {}, "group": {}, "subject": {}, "precision": {}}
    for place in places.all:
        result = place.result
        offered["status"][result.status] = None
        offered["group"][result.check.partition(".")[0]] = None
        offered["subject"][result.cell.subject] = None
        offered["precision"][result.cell.precision] = None
    statuses: list[str] = [status for status in STATUSES if status in offered["status"]]
    groups = sorted(offered["group"], key=lambda group: group_rank(f"{group}."))
    return [
        ("status", statuses),
        ("group", groups),
        *((name, list(offered[name])) for name in ("subject", "precision") if len(offered[name]) > 1),
    ]


def _kinds(timelines: list[tuple[Track, ...]]) -> set[str]:
    lines = [line for tracks in timelines for track in tracks for line in track.lines]
    return {moment.kind for line in lines for moment in line.moments}


def _sections(context: dict[str, Any]) -> list[tuple[str, str]]:
    """Anchors and names of the sections that the page has."""
    shown = [
        ("findings", "Findings", context["cards"]),
        ("map", "Checks", context["grid"].rows),
        ("versions", "Versions", context["timelines"]),
        *((anchor, short_title(title), chapter.subjects) for anchor, title, _, chapter in context["chapters"]),
        ("rehearsal", "Rehearsal", context["rehearsals"]),
        ("differences", "Differences", context["differences"]),
        ("bisections", "Bisection", context["bisections"]),
        ("errors", "Errors", context["errors"]),
        ("skipped", "Skipped", context["skipped"]),
        ("environment", "Environment", context["surroundings"].runs),
    ]
    return [(anchor, title) for anchor, title, there in shown if there]


def short_title(title: str) -> str:
    """The first word of a title: what the bar of sections has room for."""
    return title.split(" ", 1)[0]

"""The HTML report: one file that holds everything, opens offline and needs no other file."""

from __future__ import annotations

from numerics_suite.reports.html.page import render, write_html

__all__ = ["render", "write_html"]

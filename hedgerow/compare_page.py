"""A comparison as one page that needs no other file and no other machine: tables and figures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from foundation.errors import SettingsError
from foundation.messages import Json
from hedgerow.compare_plots import colour, figures_of, rows, symbol
from hedgerow.compare_report import ComparisonReport
from hedgerow.compare_tables import energy_words, grids

HERE = Path(__file__).parent


def page(report: ComparisonReport) -> str:
    """Return the whole page; raises `SettingsError` when plotly is not installed."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    entries = report.comparison["entries"]
    figures = figures_of(report)
    return environment.get_template("compare_page.html").render(
        report=report,
        fleet=report.comparison["fleet"],
        seeds=report.comparison["seeds"],
        entries=[(e["label"], e["strategy"], _settings(e["settings"])) for e in entries],
        grids=grids(report, wide=True),
        legend=[(label, index, colour(index)[1:], symbol(index)) for label, index in rows(report).items()],
        energy=energy_words(report),
        figures=Markup(_inside_script(figures)),
        figure_names=sorted(figures),  # without joules there is nothing to draw of them
        style=Markup((HERE / "compare_page.css").read_text("utf-8")),
        script=Markup((HERE / "compare_page.js").read_text("utf-8")),
        plotly=Markup(plotly_text()),
    )


def plotly_text() -> str:
    """Return plotly's script from the installed package; raises `SettingsError` when there is none."""
    found = importlib.util.find_spec("plotly")  # finds without importing: the Python side is not needed
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / "package_data" / "plotly.min.js"
        if path.is_file():
            return path.read_text("utf-8")
    raise SettingsError("--html needs plotly: pip install 'hedgerow[coordinator]'")


def _inside_script(value: Json) -> str:
    """Return JSON that cannot end the script element it stands in."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _settings(settings: Json) -> str:
    return ", ".join(f"{key} = {json.dumps(value)}" for key, value in settings.items()) or "defaults"

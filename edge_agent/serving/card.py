"""The page for people: the model card, and a form to draw, paste or type something the model answers.

`page.html` is filled in here; `page.js` and `page.css` beside it are served as they are, and nothing comes
from elsewhere.
"""

from __future__ import annotations

import json
from functools import cache
from html import escape
from importlib import resources
from string import Template

from edge_agent.serving.answers import Answer, Refused
from edge_agent.serving.predictor import Handle
from foundation.artifact import Manifest

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = (
    ("Content-Security-Policy", _POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
)
_KINDS = {"page.css": "text/css; charset=utf-8", "page.js": "text/javascript; charset=utf-8"}


def page(name: str, handle: Handle | None, top: float, *, keyed: bool = False) -> Answer:
    """Return the page of the model that answers now; `None` shows a field for the key and no fact.

    `top` is the largest value of a raw picture; `keyed` puts the key into the examples.
    """
    if handle is None:
        filled = Template(_file("page.html")).substitute(
            title="Hedgerow", rows="", example="", name="", model="null"
        )
        return Answer(filled.encode(), "text/html; charset=utf-8", headers=_HEADERS)
    m = handle.manifest
    rows = "\n".join(
        f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in _facts(handle).items()
    )
    filled = Template(_file("page.html")).substitute(
        title=escape(f"{m.agent}, round {m.round}"),
        rows=rows,
        example=escape(_example(m, ' -H "x-api-key: KEY"' if keyed else "")),
        name=escape(name),
        model=escape(json.dumps(_told(m, top))),
    )
    return Answer(filled.encode(), "text/html; charset=utf-8", headers=_HEADERS)


def asset(name: str) -> Answer:
    """Return a file of the page; raises `Refused` (404) for another."""
    if name not in _KINDS:
        raise Refused(404, f"there is no {name[:64]!r}")
    return Answer(_file(name).encode(), _KINDS[name], headers=_HEADERS)


@cache
def _file(name: str) -> str:
    return resources.files("edge_agent.serving").joinpath(name).read_text("utf-8")


def _told(m: Manifest, top: float) -> dict[str, object]:
    """Return what the form needs to know."""
    return {
        "input": m.input,
        "shape": m.shape,
        "labels": m.labels,
        "mean": m.normalisation.mean,
        "std": m.normalisation.std,
        "top": top,
    }


def _facts(handle: Handle) -> dict[str, str]:
    m = handle.manifest
    return {
        "Device": m.agent,
        "Run and round": f"{m.run}, round {m.round}, {m.strategy}",
        "Answers": _some(m.labels),
        "Input": _input(m),
        "Accuracy here": _share(m.accuracy) + f" (as it was sent: {_share(m.accuracy_sent)})",
        "Hidden units kept": f"{', '.join(map(str, m.kept_units))} of {m.hidden_units} per block",
        "Parameters": f"{m.parameters:,} of {m.dense_parameters:,}",
        "Size": f"{m.bytes / 1000:,.0f} kB (uncut: {m.dense_bytes / 1000:,.0f} kB)",
        "One answer takes": f"{_ms(m.latency_ms)} (uncut: {_ms(m.dense_latency_ms)}) when exported, "
        f"{handle.run_ms:.2f} ms when loaded",
        "Energy of training": _joules(m),
        "Proof": f"logits within {handle.parity.difference:.1e} of the trained model's on "
        f"{handle.parity.answers} answers; {handle.parity.tolerance:.1e} is allowed",
        "SHA-256": m.sha256,
    }


def _some(labels: tuple[str, ...]) -> str:
    if all(len(label) == 1 for label in labels) and len(labels) > 20:
        return f"one of {len(labels)} characters"
    shown = ", ".join(labels[:20])
    return shown if len(labels) <= 20 else f"{shown} and {len(labels) - 20} more"


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


def _ms(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f} ms"


def _joules(m: Manifest) -> str:
    return "unknown" if m.train_joules is None else f"{m.train_joules:,.1f} J, {m.train_joules_kind}"


def _input(m: Manifest) -> str:
    if m.input == "text":
        return f"text, 1 to {m.shape[0]} characters"
    return f"{m.input}, {' × '.join(map(str, m.shape))}, raw values"


def _example(m: Manifest, header: str) -> str:
    curl = f"curl http://this-device/predict{header}"
    if m.input == "text":
        letters = [label for label in m.labels if len(label) == 1 and label.isalpha()]
        sample: object = "".join(letters[-4:][: m.shape[0]]) or [0] * min(4, m.shape[0])
        return f"{curl} -d '{json.dumps({'inputs': [sample]})}'"
    numbers = f"{curl} -d '{{\"inputs\": [ ... {' × '.join(map(str, m.shape))} numbers ... ]}}'"
    if m.input == "image" and m.shape[0] in (1, 3):
        return f"{curl} --data-binary @picture.png\n{numbers}"
    return f"{numbers}\n{curl} --data-binary @{'window' if m.input == 'series' else 'picture'}.npy"

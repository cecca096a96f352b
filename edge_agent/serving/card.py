"""The model card: one plain page that says what answers here, what it cost and how to ask it."""

from __future__ import annotations

import json
from html import escape

from edge_agent.serving.predictor import Handle
from foundation.artifact import Manifest

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 2rem auto; padding: 0 1rem }}
th {{ text-align: left; padding-right: 2rem; font-weight: 600; vertical-align: top; white-space: nowrap }}
td {{ overflow-wrap: anywhere }}
pre {{ padding: 1rem; border: 1px solid; overflow-x: auto }}
</style></head><body>
<h1>{title}</h1>
<p>A personal model of this device, served from here. It proved itself when it was loaded.</p>
<table>
{rows}
</table>
<h2>Ask it</h2>
<pre>{example}</pre>
<p>Programs speak the Open Inference Protocol at <a href="/v2/models/{name}">/v2/models/{name}</a>;
counters are at <a href="/metrics">/metrics</a>.</p>
</body></html>
"""


def page(name: str, handle: Handle) -> str:
    """Return the card of the model that answers now, as HTML."""
    manifest = handle.manifest
    rows = "\n".join(
        f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in _facts(handle).items()
    )
    return _PAGE.format(
        title=escape(f"{manifest.agent}, round {manifest.round}"),
        rows=rows,
        example=escape(_example(manifest)),
        name=escape(name),
    )


def _facts(handle: Handle) -> dict[str, str]:
    m = handle.manifest
    return {
        "Run and strategy": f"{m.run}, {m.strategy}",
        "Answers": _some(m.labels),
        "Input": f"{m.input}, {' × '.join(map(str, m.shape))}, raw values",
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
    shown = ", ".join(labels[:20])
    return shown if len(labels) <= 20 else f"{shown} and {len(labels) - 20} more"


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


def _ms(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f} ms"


def _joules(m: Manifest) -> str:
    return "unknown" if m.train_joules is None else f"{m.train_joules:,.1f} J, {m.train_joules_kind}"


def _example(m: Manifest) -> str:
    if m.input == "text":
        sample: object = [0] * min(4, m.shape[0])
        if all(len(label) == 1 for label in m.labels):
            sample = "".join(m.labels[: min(4, m.shape[0])])
        body = json.dumps({"inputs": [sample]})
    else:
        body = '{"inputs": [ ... ' + " × ".join(map(str, m.shape)) + " numbers ... ]}"
    return f"curl http://this-device/predict -d '{body}'"

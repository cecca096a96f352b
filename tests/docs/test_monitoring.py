"""The monitoring page, the dashboard and the example settings against what programs tell."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from tests.docs.pages import ROOT, rows, section
from tests.exposition import Told
from tests.metrics_told import of_agent, of_coordinator, of_serving
from tests.served import publish

DASHBOARD: dict[str, Any] = json.loads((ROOT / "monitoring" / "grafana.json").read_text(encoding="utf-8"))
GIVEN = {"job", "instance"}
"""Labels that Prometheus itself gives."""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Told]]:
    artifacts = tmp_path_factory.mktemp("artifacts")
    publish(artifacts)
    agent = of_agent(tmp_path_factory.mktemp("agent"))
    return {"Coordinator": of_coordinator(), "Agent": agent, "Serving process": of_serving(artifacts)}


@pytest.mark.parametrize("program", ["Coordinator", "Agent", "Serving process"])
def test_every_metric_is_in_its_table(program: str, told: dict[str, dict[str, Told]]) -> None:
    found = {
        name.strip("`"): (kind, set(re.findall(r"`(\w+)`", labels)), text)
        for name, kind, labels, text in rows(section("docs/monitoring.md", program), "metric")
    }
    there = {name: (t.kind, t.labels(), t.help) for name, t in told[program].items()}
    assert found == there


# --- the dashboard --------------------------------------------------------------------------------

PANELS = DASHBOARD["panels"]
TARGETS = [(p["title"], t) for p in PANELS for t in p.get("targets", ())]


def names_of(expr: str) -> set[str]:
    return set(re.findall(r"\b((?:hedgerow|process)_\w+)", expr))


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_data_source_is_a_variable_everywhere() -> None:
    variables = {one["name"]: one for one in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    wanted = {"type": "prometheus", "uid": "${datasource}"}
    asking = [*(p for p in PANELS if p["type"] != "row"), *(t for _, t in TARGETS)]
    asking += [one for one in variables.values() if one["type"] == "query"]
    assert asking
    assert all(one["datasource"] == wanted for one in asking)
    used = set(re.findall(r"\$\{?(\w+)", json.dumps([t["expr"] for _, t in TARGETS])))
    assert used <= {*variables, "__rate_interval", "__range"}
    assert [DASHBOARD["uid"], DASHBOARD["title"]] == ["hedgerow", "Hedgerow"]


@pytest.mark.parametrize(("title", "target"), TARGETS, ids=[f"{t} {x['refId']}" for t, x in TARGETS])
def test_queries_ask_for_what_is_there(
    title: str, target: dict[str, Any], told: dict[str, dict[str, Told]]
) -> None:
    expr, coordinator = target["expr"], told["Coordinator"]
    (name,) = names_of(expr)
    assert name in coordinator, f"{title}: no metric {name}"
    own = coordinator[name].labels() | GIVEN
    (matchers,) = re.findall(r"\{([^}]*)\}", expr)
    asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
    shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
    assert asked | shown <= own, f"{title}: {name} has {own}"
    assert "job" in asked
    # A counter is looked at by its growth; a run's own joules are its sum so far.
    if coordinator[name].kind == "counter" and "_run_energy_" not in name:
        assert re.search(rf"(?:rate|increase)\({name}", expr)
    else:
        assert not re.search(r"\b(?:rate|increase)\(", expr)
    assert expr.count("(") == expr.count(")")


def test_energy_is_shown_by_kind_and_never_added() -> None:
    asked = [
        (p, t["expr"]) for p in PANELS for t in p.get("targets", ()) if re.search("joules|watts", t["expr"])
    ]
    assert len(asked) == 6
    for panel, expr in asked:
        (kind,) = re.findall(r'kind="(\w+)"', expr)
        assert kind in panel["title"]
        assert not re.match(r"\s*(?:sum|avg|max|min)\b", expr)
        dashed = "lineStyle" in panel["fieldConfig"]["defaults"]["custom"]
        assert dashed == (kind != "measured"), "what is modelled looks like it"


def test_the_variables_ask_for_what_is_there(told: dict[str, dict[str, Told]]) -> None:
    for one in DASHBOARD["templating"]["list"]:
        if one["type"] == "query":
            name, _, label = re.fullmatch(
                r"label_values\((\w+)(\{.*\})?, (\w+)\)", one["query"]["query"]
            ).groups()  # type: ignore[union-attr]
            assert label in told["Coordinator"][name].labels() | GIVEN


def test_the_example_settings_of_prometheus_are_read() -> None:
    text = (ROOT / "monitoring" / "prometheus.yml").read_text(encoding="utf-8")
    (commented,) = re.findall(r"(?ms)^  (# - job_name.*?)\n\n", text)
    jobs = yaml.safe_load(text)["scrape_configs"]
    (remote,) = yaml.safe_load(re.sub(r"(?m)^\s*# ", "", commented))
    assert [job["job_name"] for job in jobs] == ["hedgerow", "hedgerow-agent", "hedgerow-serving"]
    assert remote["job_name"] == "hedgerow"
    assert {"scheme", "authorization", "tls_config"} <= remote.keys()
    assert all(job["static_configs"][0]["targets"] for job in (*jobs, remote))

"""The Grafana dashboard shows what a server exports, all of it, under the names it has there."""

import json
import re
from pathlib import Path

import pytest

from engine.server import metrics_route

pytestmark = pytest.mark.ispc
DASHBOARD = Path(metrics_route.__file__).parent / "grafana" / "neo.json"
NOT_SHOWN = {"neo:request_params_n"}


def test_every_metric_of_the_dashboard_is_exported(smollm2_server) -> None:
    body = {"prompt": "One, two,", "max_tokens": 3, "temperature": 0}
    assert smollm2_server.post("/v1/completions", body)[0] == 200
    _, text = smollm2_server.get("/metrics")
    samples = {re.match(r"[\w:]+", line)[0]: line for line in text.splitlines() if line[:1] != "#"}
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())]
    shown = {name for expr in expressions for name in re.findall(r"neo:\w+", expr)}
    assert shown <= set(samples), sorted(shown - set(samples))
    for expr in expressions:
        for labels in re.findall(r"by \((\w+)\) \(rate\((neo:\w+)", expr):
            assert f'{labels[0]}="' in samples[labels[1]], labels
        for name in re.findall(r"(neo:\w+)\{model_name", expr):
            assert 'model_name="' in samples[name], name


def test_nothing_that_is_exported_is_forgotten(smollm2_server) -> None:
    _, text = smollm2_server.get("/metrics")
    families = set(re.findall(r"# TYPE (neo:\w+) ", text))
    assert len(families) > 25
    dashboard = DASHBOARD.read_text()
    forgotten = {name for name in families if name not in dashboard} - NOT_SHOWN
    assert not forgotten


def test_panels_do_not_overlap_and_have_titles() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    taken, ids = set(), set()
    for panel in dashboard["panels"]:
        assert panel["title"]
        ids.add(panel["id"])
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, panel["title"]
                taken.add((x, y))
    assert len(ids) == len(dashboard["panels"])

"""What operators watch exists: metrics in code, documents and dashboard; one log line a shard."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from one4all.corpus.tar import TarContainer
from one4all.ledger import Census
from pipelines import telemetry
from pipelines.protect.job import _log_line
from pipelines.protect.run_metrics import RunMetrics
from pipelines.protect.unit_status import UnitStatus
from pipelines.telemetry import METRICS

ROOT = Path(__file__).parents[2]


def queries() -> str:
    dashboard = json.loads((ROOT / "cluster" / "grafana" / "one4all.json").read_text())
    return " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])


def test_dashboard_shows_every_metric_and_no_other():
    shown = set(re.findall(r"ray_\w+", queries()))
    exported = {name: metric for metric in METRICS.values() for name in metric.exported_names}
    assert shown <= exported.keys(), "panels that would stay empty"
    assert {exported[name].name for name in shown} == METRICS.keys(), "metrics without a panel"


def test_labels_of_the_dashboard_are_tags_of_the_code():
    grouped = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", queries()))))
    assert grouped - {"le"} == {tag for metric in METRICS.values() for tag in metric.tags}


def test_every_metric_is_set_somewhere_and_documented():
    telemetry_source = (ROOT / "pipelines" / "telemetry.py").read_text()
    source = "".join(path.read_text() for path in (ROOT / "pipelines").rglob("*.py"))
    names = r'"(one4all_\w+)"'
    assert METRICS.keys() <= set(re.findall(names, source.replace(telemetry_source, "")))
    page = (ROOT / "docs" / "operations.md").read_text()
    assert set(re.findall(r"`(one4all_\w+)`", page)) == METRICS.keys()


def test_metrics_outside_ray_cost_nothing_and_do_not_import_it():
    code = (
        "import sys; from pipelines import telemetry; "
        "telemetry.count('one4all_images', 3); telemetry.show('one4all_pending_shards', 1); "
        "sys.exit('ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(KeyError):
        telemetry.count("one4all_imagse")


def test_counters_of_a_run_begin_at_zero_and_hold_what_workers_report(monkeypatch):
    """Else the first value is in no rate of Prometheus; a real one is asked in test_prometheus."""
    seen: dict[tuple[str, ...], float] = {}

    class Recorded:
        def __init__(self, metric):
            self._name = metric.name

        def _record(self, value, tags):
            assert set(tags) == set(METRICS[self._name].tags)
            seen[self._name, *sorted(tags.values())] = value

        def inc(self, value, tags):
            key = (self._name, *sorted(tags.values()))
            seen[key] += value  # a KeyError if it was not begun

        set = _record

        def observe(self, value, tags):
            assert set(tags) == set(METRICS[self._name].tags)

    monkeypatch.setattr(telemetry, "_metric", lambda name: Recorded(METRICS[name]))
    metrics = RunMetrics("run", "out", None)
    metrics.plan(Census(TarContainer(), num_pending=2, oldest_pending=90.0))
    assert seen["one4all_oldest_pending_timestamp_seconds", "out"] == 90
    metrics.tell(UnitStatus("a.tar", num_protected=3, num_bytes=7, seconds={"read": 0.5}))
    for attempt, kind in ((1, "ShardError"), (2, "ZeroDivisionError"), (3, "ShardError")):
        failed = UnitStatus("b.tar", "failed", error="e", error_kind=kind, attempt=attempt)
        metrics.tell(failed)
    assert seen["one4all_images", "out", "run"] == 3
    assert seen["one4all_stage_seconds", "out", "read", "run"] == 0.5
    assert seen["one4all_failures", "ShardError", "out", "run"] == 2
    assert seen["one4all_failures", "other", "out", "run"] == 1
    assert seen["one4all_pending_shards", "out", "run"] == 0, "the second is given up"
    assert not any(name[0].startswith("one4all_last_success") for name in seen)


def test_gauges_are_set_again_until_the_run_ends(monkeypatch):
    """Ray drops one that is not set for 20 s."""
    values = []
    gauge = type("", (), {"set": lambda self, value, tags: values.append((value, tags))})()
    monkeypatch.setattr(telemetry, "_metric", lambda name: gauge)
    monkeypatch.setattr(telemetry, "_KEEP_SECONDS", 0.01)
    with telemetry.gauges_kept():
        telemetry.show("one4all_training_step", 5, destination="d")
        time.sleep(0.1)
    assert len(values) > 2
    assert values[-1] == (5, {"destination": "d"})
    before = len(values)
    time.sleep(0.05)
    assert len(values) == before


def test_log_line_holds_what_one_shard_took():
    seconds = dict.fromkeys(("read", "decode", "device", "encode", "write"), 0.5)
    status = UnitStatus(
        "a/b.tar", "failed", num_bytes=10, seconds=seconds, error="truncated\nat byte 7", attempt=2
    )
    line = _log_line(status, "run1")
    assert "\n" not in line
    parsed = json.loads(line)
    assert (parsed["name"], parsed["status"], parsed["bytes"]) == ("a/b.tar", "failed", 10)
    assert parsed["error"] == status.error
    assert parsed["seconds"] == seconds
    assert parsed["attempt"] == 2

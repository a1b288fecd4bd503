"""What operators watch exists: metrics in code, documents and dashboard; one log line a shard."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import telemetry
from pipelines.protect.job import _log_line
from pipelines.protect.worker import UnitStatus
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
    source = "".join(path.read_text() for path in (ROOT / "pipelines").rglob("*.py"))
    used = set(re.findall(r'telemetry\.(?:count|observe|show)\(\s*"(\w+)"', source))
    assert used == METRICS.keys()
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

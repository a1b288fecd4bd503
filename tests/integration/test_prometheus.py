"""What a real Prometheus sees of a run: as much as there was, each failure, no second more."""

import subprocess
import sys
import time

import pytest
import yaml
from support import prometheus as debian
from support.builders import write_corpus
from support.ray_cluster import ROOT

from one4all.ledger import Ledger
from one4all.storage import open_storage

pytestmark = [
    pytest.mark.cluster,  # for the agent that exports metrics
    pytest.mark.timeout(300),
    pytest.mark.skipif(not debian.program(), reason="make test-cluster installs Prometheus"),
]
_DRIVER = """
import sys
from pipelines.protect.config import ProtectConfig
from pipelines.protect.job import protect
from pipelines.ray_session import ray_session
from pipelines.settings import RayConfig

source, destination, protector = sys.argv[1:]
with ray_session(RayConfig(num_cpus=2)):
    import ray
    print(ray.nodes()[0]["MetricsExportPort"], flush=True)
    sys.stdin.readline()
    config = ProtectConfig(protector=protector, batch_size=4, cpus_per_worker=1)
    print(protect(source, destination, config).num_images, flush=True)
    sys.stdin.readline()
"""


def test_prometheus_counts_what_was_done(tmp_path, protector_folder, monkeypatch):
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "2000")
    corpus, out = write_corpus(tmp_path / "in", num_shards=12, num_samples=10), tmp_path / "out"
    (corpus / "damaged.tar").write_bytes(b"no tar at all" * 100)
    arguments = [str(corpus), str(out), str(protector_folder)]
    driver = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert driver.stdin is not None
    assert driver.stdout is not None
    with driver:
        port = int(driver.stdout.readline())
        with debian.prometheus(tmp_path, [f"127.0.0.1:{port}"]) as server:
            time.sleep(2 * debian.SCRAPE_SECONDS)
            driver.stdin.write("\n")
            driver.stdin.flush()
            assert int(driver.stdout.readline()) == 120
            window = "[10m]"

            def grown(metric: str, by: str = "") -> dict[str, float]:
                """What `increase` of a dashboard rests on: the last value less the first one.

                `increase` itself extrapolates to the ends of the window, of a run as short as
                this one by more than a tenth when a scrape is late.
                """
                grouped = f"sum by ({by})" if by else "sum"
                counter = f"ray_one4all_{metric}_total{window}"
                return server.query(
                    f"{grouped} (max_over_time({counter}) - min_over_time({counter}))"
                )

            def counts() -> dict[str, float]:
                found = grown("images") | grown("failures", "kind") | grown("shards", "status")
                return {label: number for label, number in found.items() if number}

            done = {"": 120, "kind=ShardError": 3, "status=done": 12, "status=failed": 3}
            deadline = time.monotonic() + 60  # Ray exports now and then, a scrape comes later
            while counts() != done and time.monotonic() < deadline:
                time.sleep(debian.SCRAPE_SECONDS)
            assert counts() == done
            seconds = grown("stage_seconds", "stage")
            manifests = list(Ledger(open_storage(str(out))).manifests())
            for stage in ("decode", "device", "encode"):
                true = sum(manifest.seconds[stage] for manifest in manifests)
                assert seconds[f"stage={stage}"] == pytest.approx(true), stage
            longest = max(manifest.seconds["device"] for manifest in manifests)
            quantile = server.query(
                "histogram_quantile(0.95, sum by (le) "
                '(ray_one4all_shard_seconds_bucket{stage="device"}))'
            )[""]
            assert quantile < 1.6 * longest, "the bounds are too far apart"
            [pending] = server.query(
                f'last_over_time(ray_one4all_pending_shards{{destination="{out}", run!=""}}[1m])'
            ).values()
            assert pending == 0
            oldest = "ray_one4all_oldest_pending_timestamp_seconds"
            [written] = server.query(f"last_over_time({oldest}[1m])").values()
            assert 0 < time.time() - written < 300
        driver.stdin.write("\n")


def test_alerts_fire_when_nothing_succeeds_and_shards_wait(tmp_path):
    """The rules of the cluster, by Prometheus' own tool for testing rules."""
    rules = ROOT / "cluster" / "kubernetes" / "monitoring" / "rules.yaml"
    spec = yaml.safe_load(rules.read_text("utf-8"))["spec"]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(spec))
    success = 'ray_one4all_last_success_timestamp_seconds{destination="d", WorkerId="w"}'
    oldest = 'ray_one4all_oldest_pending_timestamp_seconds{destination="d"}'

    def alert(name: str, minutes: int, fires: bool) -> dict[str, object]:
        [rule] = [rule for rule in spec["groups"][0]["rules"] if rule["alert"] == name]
        text = {
            key: value.replace("{{ $labels.destination }}", "d")
            for key, value in rule["annotations"].items()
        }
        labels = {"severity": "warning", "destination": "d"}
        expected = [{"exp_labels": labels, "exp_annotations": text}] if fires else []
        return {"eval_time": f"{minutes}m", "alertname": name, "exp_alerts": expected}

    scene = {
        "interval": "1m",
        # Told by a run of ten minutes at the start, which found a success 0 s after 1970.
        "input_series": [
            {"series": success, "values": "0x10 _x3000"},
            {"series": oldest, "values": "0x10 _x1380 0x200"},
        ],
        "alert_rule_test": [
            alert("One4allNoSuccess", 120, False),
            alert("One4allNoSuccess", 200, True),
            alert("One4allOldestPending", 120, False),
            alert("One4allOldestPending", 1500, True),
        ],
    }
    test = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": [scene]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    command = [str(debian.program("promtool")), "test", "rules", str(tmp_path / "test.yml")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr

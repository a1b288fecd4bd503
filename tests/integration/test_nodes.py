"""A cluster of three nodes and a store that asks for a key: nodes are lost, slots overlap."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest
import yaml
from support.builders import write_corpus
from support.jobs import finish, read_until, start, start_with_ray
from support.ray_cluster import PROGRAM, ROOT

from one4all.errors import AccessError, NotFoundError
from one4all.ledger.ledger import Ledger
from one4all.storage import open_storage
from pipelines.telemetry import METRICS
from pipelines.train.status import read_training
from pipelines.verify import VerifyConfig, verify

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]


def upload(folder: Path, uri: str, pattern: str = "*") -> str:
    storage = open_storage(uri)
    for path in sorted(folder.glob(pattern)):
        storage.write_bytes(path.name, path.read_bytes())
    return uri


def wait_until(condition: Callable[[], object], run, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.fixture
def protector(cluster_uri, protector_folder) -> str:
    return upload(protector_folder, f"{cluster_uri}/protector")


def test_a_wrong_key_or_token_is_refused(cluster, cluster_uri, monkeypatch):
    open_storage(cluster_uri).write_bytes("a", b"b")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(AccessError, match=r"SignatureDoesNotMatch|denied|refuse"):
            open_storage(cluster_uri).check(writable=False)
    code, printed = finish(start(cluster, "verify", cluster_uri, "x", RAY_AUTH_TOKEN="0" * 32))
    assert code == 2
    assert "cannot submit to" in printed


def test_protect_survives_the_loss_of_a_node(cluster, two_nodes, cluster_uri, tmp_path, protector):
    corpus = write_corpus(tmp_path / "in", num_shards=10, num_samples=60)
    source, destination = upload(corpus, f"{cluster_uri}/in"), f"{cluster_uri}/out"
    ledger = Ledger(open_storage(destination))
    small = ["--protector", protector, "--set", "batch_size=4"]
    job = start_with_ray(cluster, tmp_path, "protect", source, destination, *small)
    wait_until(lambda: len(list(ledger.entries())) >= 2, job)
    # Counted before: until the cluster knows of its loss, the other node may do all the rest.
    assert len(list(ledger.entries())) < 10, "the shards are too small to lose a node among them"
    cluster.lose(two_nodes[0])
    code, printed = finish(job)
    assert code == 0, printed
    assert "10 of 10 shards protected" in printed
    assert verify(source, destination, VerifyConfig()).ok


def test_nodes_that_join_are_used_within_a_minute(
    cluster, two_nodes, cluster_uri, tmp_path, protector
):
    """Without a number of workers; and that one is too large for the nodes there are is said."""
    [shard] = write_corpus(tmp_path / "in", num_shards=1, num_samples=60).glob("*.tar")
    source, destination = f"{cluster_uri}/in", f"{cluster_uri}/out"
    for number in range(300):  # work for minutes
        open_storage(source).write_bytes(f"{number:03}.tar", shard.read_bytes())
    small = ["--protector", protector, "--set", "batch_size=4"]
    cluster.lose(two_nodes[0])

    def workers() -> int:
        with cluster.get("/api/v0/actors?limit=1000&detail=1") as answer:
            actors = json.load(answer)["data"]["result"]["result"]
        alive = [actor for actor in actors if actor["state"] == "ALIVE"]
        return sum("ProtectWorker" in actor["class_name"] for actor in alive)

    settings = ["--set", "cpus_per_worker=2", "--set", "gpus_per_worker=0"]
    job = start(cluster, "--stop-on-interrupt", "protect", source, destination, *small, *settings)
    said = read_until(job, "no node can hold")
    assert "a worker of 2 CPUs: there are " in said
    assert "node of 1 CPU" in said
    large = cluster.add_node(num_cpus=2)
    wait_until(lambda: workers() == 1, job, 120)
    more = cluster.add_node(num_cpus=2)
    wait_until(lambda: workers() == 2, job, 60)
    job.send_signal(signal.SIGINT)
    code, printed = finish(job)
    assert code == 130, printed
    cluster.lose(large, more)


def test_slots_protect_what_is_new_and_one_that_overlaps_does_nothing(
    cluster, two_nodes, cluster_uri, tmp_path, protector
):
    """What the CronJob runs, but for the hour: the shell around `one4all submit`, and its slots.

    Workers want two CPUs, which no node has: the first slot waits for a node that does, as on a
    cluster that grows.
    """
    corpus = write_corpus(tmp_path / "in", num_shards=7, num_samples=8)
    source, destination = f"{cluster_uri}/in", f"{cluster_uri}/out"
    manifest = yaml.safe_load((ROOT / "cluster/kubernetes/base/cronjob.yaml").read_text())
    template = manifest["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    [container] = template["containers"]
    assert container["args"][:2] == ["one4all", "submit"]

    large = ["--set", "num_workers=1", "--set", "cpus_per_worker=2"]

    def slot(hour: int) -> subprocess.Popen[str]:
        submit = [sys.executable, "-m", "pipelines", "submit", "--address", cluster.address]
        submit += ["--program", PROGRAM, "--submission-id", f"protect-2026-11-01T{hour:02}"]
        protect = ["protect", source, destination, "--protector", protector]
        settings = ["--set", "lease_seconds=8", *large]
        return cluster.open([*container["command"], *submit, *protect, *settings])

    def holder() -> str:
        try:
            lease = open_storage(destination).read_bytes("_one4all/lease.json")
            return str(json.loads(lease)["run_id"])
        except NotFoundError:
            return ""

    upload(corpus, source, "shard-00[0-2].tar")
    first = slot(1)
    wait_until(holder, first)
    upload(corpus, source, "shard-00[34].tar")
    code, printed = finish(slot(2))
    assert code == 0, printed
    assert "ended with exit status 75" in printed
    assert "another run holds the lease" in printed
    assert first.poll() is None
    large_node = cluster.add_node(num_cpus=2)
    code, printed = finish(first)
    assert code == 0, printed
    assert not holder()
    upload(corpus, source, "shard-00[56].tar")
    code, printed = finish(slot(3))
    assert code == 0, printed
    assert re.search(r"7 of 7 shards protected \([24] now,", printed), printed
    runs = {
        manifest.name: manifest.run_id for manifest in Ledger(open_storage(destination)).manifests()
    }
    assert len(runs) == 7
    assert len(set(runs.values())) == 2, "the slot that overlapped has done something"
    assert verify(source, destination, VerifyConfig()).ok
    cluster.lose(large_node)


# --- training --------------------------------------------------------------------------------


STEPS = 5000
WARM_UP = STEPS // 100


class Training:
    """`one4all train` in a bucket, and its log."""

    def __init__(self, cluster_uri: str, tmp_path: Path) -> None:
        corpus = write_corpus(tmp_path / "in", num_shards=4, num_samples=24)
        self.output, self.run = f"{cluster_uri}/protector", f"{cluster_uri}/run"
        self.command = ["train", upload(corpus, f"{cluster_uri}/in"), self.output]
        for setting in (
            f"run_folder={self.run}",
            "encoder={kind: embedded, input_size: 32}",
            "generator={width: 8, num_blocks: 1, num_downsamplings: 1}",
            "vocabulary=broad",
            "batch_size=8",
            "learning_rate=5.0e-3",
            "log_every=1",
            "lease_seconds=5",
            "num_workers=[1, 2]",
            "max_failures=1",
            "resize_seconds=5",
            f"steps={STEPS}",
            "checkpoint_every=50000",
        ):
            self.command += ["--set", setting]

    def log(self) -> list[dict[str, float]]:
        try:
            lines = open_storage(self.run).read_bytes("metrics.jsonl").decode().splitlines()
        except NotFoundError:
            return []
        return [json.loads(line) for line in lines]

    def step(self) -> int:
        return int(max((entry["step"] for entry in self.log()), default=0))

    def checkpoints(self) -> list[int]:
        keys = [info.key for info in open_storage(self.run).list() if info.key.startswith("step-")]
        return sorted({int(key.split("/")[0].removeprefix("step-")) for key in keys})

    def go_on_here(self, cluster) -> subprocess.Popen[str]:
        """The same command, with a Ray of its own."""
        here = [sys.executable, "-m", "pipelines", *self.command, "--set", "ray.num_cpus=1"]
        return cluster.open(here, RAY_ADDRESS="")

    def kill_driver(self, cluster) -> None:
        for process in cluster.processes():
            if self.run in " ".join(process.cmdline()) and "submit" not in process.cmdline():
                process.send_signal(signal.SIGKILL)


def test_training_follows_the_nodes_and_goes_on_on_another_cluster(
    cluster, two_nodes, cluster_uri, tmp_path
):
    """A loss that is announced, a node that joins, a loss without notice, a killed driver.

    The last one: what a killed driver had reserved, no training has for three minutes.
    """
    training = Training(cluster_uri, tmp_path)
    whole = next((tmp_path / "in").glob("*.tar")).read_bytes()
    open_storage(f"{cluster_uri}/in").write_bytes("damaged.tar", whole[: len(whole) // 2])
    job = start(cluster, *training.command)
    wait_until(lambda: training.step() >= 30, job)
    cluster.announce_loss(two_nodes[0], seconds=15)
    wait_until(training.checkpoints, job)
    wait_until(lambda: training.log()[-1]["world_size"] == 1, job)
    [saved] = training.checkpoints()
    before = training.log()[:saved]
    resumed = next(entry["step"] for entry in training.log() if entry["world_size"] == 1)
    assert resumed == saved + 1

    added = cluster.add_node()
    # Again from the checkpoint: what one worker has done since is replaced step by step.
    wait_until(lambda: training.log()[saved]["world_size"] == 2, job)
    sizes = [entry["world_size"] for entry in training.log()[saved:]]
    assert sizes == sorted(sizes, reverse=True)
    names = {name for metric in METRICS.values() for name in metric.exported_names}
    wanted = {name for name in names if "train" in name or "step" in name}
    wait_until(lambda: wanted <= cluster.metrics(), job)

    cluster.lose(added)
    wait_until(lambda: training.log()[saved]["world_size"] == 1, job)
    training.kill_driver(cluster)
    code, printed = finish(job)
    assert code not in (0, 2), printed
    assert re.search(r"left out from its damage on: \S+/damaged\.tar: .*truncated", printed), (
        printed
    )
    seen = read_training(training.output)
    assert seen is not None
    assert seen.run_folder == training.run
    assert [entry["step"] for entry in seen.history] == list(range(1, training.step() + 1))
    assert [uri.rpartition("/")[2] for uri in seen.damaged] == ["damaged.tar"]

    elsewhere = training.go_on_here(cluster)
    wait_until(lambda: training.log()[saved] != seen.history[saved], elsewhere)
    wait_until(lambda: training.step() >= saved + 10, elsewhere)
    elsewhere.send_signal(signal.SIGINT)
    code, printed = finish(elsewhere)
    assert code == 130, printed
    log = training.log()
    assert [entry["step"] for entry in log] == list(range(1, len(log) + 1))
    assert log[:saved] == before
    rates = [entry["learning_rate"] for entry in log]
    up, down = rates[:WARM_UP], rates[WARM_UP:]
    assert (up, down) == (sorted(up), sorted(down, reverse=True)), "the schedule began again"
    fresh, kept = (
        mean(entry["loss"] for entry in part) for part in (log[:2], log[saved : saved + 10])
    )
    assert kept < fresh, "the generator began again"

"""Jobs on a Ray cluster of real processes: followed, repeated, interrupted."""

import json
import signal
import time
from pathlib import Path

import pytest
from support.builders import make_binding, make_image, make_tar, write_corpus
from support.jobs import finish, read_until, start

from one4all.storage import open_storage
from pipelines.telemetry import METRICS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NO_SUCCESS_YET = "one4all_last_success_timestamp_seconds"
TRAINING = {name for name in METRICS if "train" in name or "step" in name}  # see test_nodes.py


@pytest.fixture
def corpus(tmp_path, cluster_uri) -> str:
    """Four shards in a bucket, one of them with a bad image."""
    folder = write_corpus(tmp_path / "in", num_shards=3)
    (folder / "bad.tar").write_bytes(make_tar([("a.jpg", make_image()), ("b.jpg", b"junk")]))
    storage = open_storage(f"{cluster_uri}/in")
    for path in folder.glob("*.tar"):
        storage.write_bytes(path.name, path.read_bytes())
    return f"{cluster_uri}/in"


def test_slot_runs_once_with_plain_lines_and_the_exit_status_of_its_driver(
    cluster, corpus, cluster_uri, protector_folder: Path
):
    arguments = ["--slot", "daily", "protect", corpus, f"{cluster_uri}/out", "--log-json"]
    arguments += ["--protector", str(protector_folder), "--set", "batch_size=4"]
    first = start(cluster, *arguments)
    # Asked while it runs: a gauge goes when the driver does.
    exported: set[str] = set()
    while first.poll() is None:
        exported |= cluster.metrics()
        time.sleep(1)
    code, printed = finish(first)
    assert code == 3, printed  # an image was dropped
    assert "4 of 4 shards protected (4 now, 16 images); 1 bad images" in printed
    assert "4 of 4 shards, " in printed  # progress
    assert "\r" not in printed
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert {line["name"]: line["status"] for line in lines} == dict.fromkeys(
        ["bad.tar", *(f"shard-{index:03d}.tar" for index in range(3))], "done"
    )
    assert all(line["seconds"]["device"] > 0 for line in lines)

    code, printed = finish(start(cluster, *arguments))
    assert code == 3
    assert "was submitted already" in printed
    assert "(4 now, 16 images)" in printed, "the log of the first submission"
    missing = {
        name
        for name, metric in METRICS.items()
        if name not in {NO_SUCCESS_YET, *TRAINING} and not exported & set(metric.exported_names)
    }
    assert not missing, sorted(exported)


def test_impossible_request_keeps_its_exit_status(cluster, cluster_uri):
    """That of a held lease is in test_nodes.py, in a slot that overlaps another."""
    code, printed = finish(start(cluster, "protect", f"{cluster_uri}/none", f"{cluster_uri}/out"))
    assert code == 2, printed


def test_interrupt_ends_following_and_only_a_second_one_the_job(cluster, corpus, cluster_uri):
    storage = open_storage(f"{cluster_uri}/out")
    storage.write_bytes("_one4all/binding.json", binding(corpus))  # and nothing is ever done
    watch = ["--submission-id", "watching", "status", storage.uri, "--watch", "1"]
    first = start(cluster, *watch)
    read_until(first, "0 of 4 shards done, 4 pending")
    first.send_signal(signal.SIGINT)
    again = read_until(first, "--submission-id watching").split()
    code, _ = finish(first)
    assert code == 130
    assert again[:2] == ["one4all", "submit"]

    second = start(cluster, "--submission-id", "watching")
    read_until(second, "4 pending")  # it went on
    second.send_signal(signal.SIGINT)
    read_until(second, "another Ctrl-C")
    second.send_signal(signal.SIGINT)
    code, printed = finish(second)
    assert code == 130
    assert "watching has ended" in printed
    code, printed = finish(start(cluster, "--submission-id", "watching"))
    assert (code, "watching was stopped" in printed) == (130, True)
    code, printed = finish(start(cluster, "--submission-id", "watching", "verify", "a", "b"))
    assert (code, "belongs to another job" in printed) == (2, True)


def binding(source: str) -> bytes:
    return (
        make_binding(source, protector_sha256="00", max_image_pixels=1000)
        .model_dump_json()
        .encode()
    )

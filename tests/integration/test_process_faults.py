"""Faults that need processes: killed workers, killed drivers, two runs at once, Ctrl-C.

The rows of the fault table that need none are in `tests/unit/test_faults.py`.
"""

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from support import faulty_workers
from support.builders import fill_corpus, make_image, make_samples, make_tar, write_corpus
from support.fault_proxy import Fault, FaultProxy

from one4all.errors import One4AllError
from one4all.ledger.ledger import Ledger
from one4all.storage import INTERNAL, open_storage
from one4all.storage.s3 import PART_BYTES
from pipelines.protect import runner
from pipelines.protect.config import ProtectConfig
from pipelines.protect.job import protect
from pipelines.verify import VerifyConfig, verify

pytestmark = pytest.mark.usefixtures("s3_endpoint")
fault = pytest.mark.fault
HERE = VerifyConfig(runner="local")


@pytest.fixture(params=["local", "ray"])
def config(request, protector_folder):
    """For workers of either kind."""
    if request.param == "ray":
        request.getfixturevalue("ray_local")
    folder = str(protector_folder)
    return ProtectConfig(protector=folder, batch_size=4, cpus_per_worker=1, runner=request.param)


def start(source, destination, protector: Path, *settings: str, **environment: str):
    """`one4all protect` as a process."""
    command = [sys.executable, "-m", "pipelines", "protect", str(source), str(destination)]
    command += ["--protector", str(protector), "--set", "batch_size=4"]
    for setting in settings:
        command += ["--set", setting]
    return subprocess.Popen(
        command,
        env=os.environ | {"RAY_ADDRESS": ""} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition, run: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def outputs(uri: str) -> dict[str, bytes]:
    """What a reader of the destination sees, beside our records."""
    storage = open_storage(str(uri))
    keys = [info.key for info in storage.list() if not info.key.startswith(INTERNAL)]
    return {key: storage.read_bytes(key) for key in keys}


@fault("actor killed -9 mid-shard")
def test_every_shard_survives_the_death_of_its_worker(tmp_path, config, monkeypatch):
    corpus = write_corpus(tmp_path / "in", num_shards=3)
    marks = tmp_path / "killed"
    marks.mkdir()
    monkeypatch.setattr(runner, "ProtectWorker", partial(faulty_workers.OnceKilledWorker, marks))
    result = protect(str(corpus), str(tmp_path / "out"), config)
    assert len(list(marks.iterdir())) == 3, "the fault was never injected"
    assert (result.exit_code, result.num_done) == (0, 3)
    assert verify(str(corpus), str(tmp_path / "out"), HERE).ok
    assert not list((tmp_path / "out").rglob("*.one4all-tmp"))


@fault("shard that kills its process (poison)")
def test_poison_shard_is_given_up_after_three_attempts(tmp_path, config, monkeypatch):
    corpus = write_corpus(tmp_path / "in", num_shards=2)
    (corpus / "poison.tar").write_bytes((corpus / "shard-000.tar").read_bytes())
    monkeypatch.setattr(runner, "ProtectWorker", faulty_workers.PoisonedWorker)
    result = protect(str(corpus), str(tmp_path / "out"), config)
    assert (result.exit_code, result.num_done) == (3, 2)
    assert result.quarantined == {"poison.tar": "the worker process died"}
    assert set(outputs(tmp_path / "out")) == {"shard-000.tar", "shard-001.tar"}
    problems = verify(str(corpus), str(tmp_path / "out"), HERE).problems
    assert problems == ["poison.tar: not protected (the worker process died)"]


@fault("loose image that kills its process (poison)")
def test_poison_image_is_given_up_and_its_neighbours_are_not(tmp_path, config, monkeypatch):
    source, out = open_storage(str(tmp_path / "in")), str(tmp_path / "out")
    fill_corpus(source, "images")
    source.write_bytes("a/poison.jpg", make_image(seed=50))
    monkeypatch.setattr(runner, "ProtectWorker", faulty_workers.PoisonedByImageWorker)
    result = protect(source.uri, out, config)
    assert (result.exit_code, result.num_done) == (3, 7)
    assert result.quarantined == {"a/poison.jpg": "the worker process died"}
    problems = verify(source.uri, out, HERE).problems
    assert problems == ["a/poison.jpg: not protected (the worker process died)"]


@fault("driver killed -9, and two runs at once: loose images, Parquet files")
@pytest.mark.parametrize("container", ["images", "parquet"])
def test_killed_and_doubled_runs_leave_the_output_of_an_undisturbed_one(
    tmp_path, protector_folder, ray_local, container
):
    import ray

    source = open_storage(str(tmp_path / "in"))
    fill_corpus(source, container, num_images=150)
    address = ray.get_runtime_context().gcs_address
    settings = (f"ray.address={address}", "lease_seconds=0", "cpus_per_worker=1")
    killed = start(source.uri, tmp_path / "out", protector_folder, *settings)
    storage = open_storage(str(tmp_path / "out"))
    wait_until(lambda: next(storage.list(f"{INTERNAL}starts/"), None), killed)
    time.sleep(3)
    killed.kill()
    killed.communicate()
    runs = [start(source.uri, tmp_path / "out", protector_folder, *settings) for _ in range(2)]
    for run in runs:
        _, errors = run.communicate(timeout=200)
        assert run.returncode == 0, errors
    undisturbed = start(source.uri, tmp_path / "whole", protector_folder, *settings)
    assert undisturbed.wait(timeout=200) == 0
    undisturbed.communicate()
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")
    assert verify(source.uri, str(tmp_path / "out"), HERE).ok
    assert not list((tmp_path / "out").rglob("*.one4all-tmp"))


@fault("worker that dies before it takes a shard")
def test_workers_that_cannot_start_end_the_run(tmp_path, config, monkeypatch):
    corpus = write_corpus(tmp_path / "in", num_shards=1)
    monkeypatch.setattr(runner, "ProtectWorker", faulty_workers.StillbornWorker)
    monkeypatch.setattr(runner, "MAX_DEAD_STARTS", 1)
    if config.runner == "ray":
        result = protect(str(corpus), str(tmp_path / "out"), config)
        assert result.exit_code == 1
        assert "workers die while they load" in result.failed["shard-000.tar"]
    else:
        with pytest.raises(One4AllError, match="no worker can start: SIGKILL") as raised:
            protect(str(corpus), str(tmp_path / "out"), config)
        assert raised.value.exit_code == 1
    monkeypatch.undo()
    assert protect(str(corpus), str(tmp_path / "out"), config).exit_code == 0


@pytest.mark.timeout(900)
@fault("driver killed -9 at ten random moments")
def test_driver_killed_ten_times_then_the_output_of_an_undisturbed_run(
    tmp_path, s3_uri, protector_folder
):
    corpus = write_corpus(tmp_path / "in", num_shards=40, num_samples=40)
    began = time.monotonic()
    settings = ("ray.num_cpus=1", "lease_seconds=1")
    undisturbed = start(corpus, tmp_path / "out", protector_folder, *settings)
    assert undisturbed.wait(timeout=200) == 0
    undisturbed.communicate()
    whole_run = time.monotonic() - began  # a slow machine needs longer before a kill can matter
    expected = outputs(tmp_path / "out")

    chance = random.Random(20)
    ledger = Ledger(open_storage(s3_uri))
    done: dict[str, str] = {}
    for _ in range(10):
        driver = start(corpus, s3_uri, protector_folder, *settings)
        time.sleep(chance.uniform(2, max(10, whole_run)))
        driver.kill()
        driver.communicate()
        now = {m.name: m.run_id for m in ledger.manifests()}
        assert done.items() <= now.items(), "something done was done again"
        visible = outputs(s3_uri)
        assert now.keys() <= visible.keys()
        assert visible.items() <= expected.items(), "something partial or different is visible"
        done = now
    assert len(done) > 0, "no kill came late enough to matter"
    last = start(corpus, s3_uri, protector_folder, *settings)
    printed, errors = last.communicate(timeout=200)
    assert last.returncode == 0, errors
    assert "40 of 40 shards protected" in printed
    assert "Traceback" not in errors
    assert outputs(s3_uri) == expected
    assert verify(str(corpus), s3_uri, HERE).ok


@fault("two runs at once on one prefix, with a lease")
def test_second_run_is_turned_away(tmp_path, s3_uri, protector_folder):
    corpus = write_corpus(tmp_path / "in", num_shards=12, num_samples=10)
    settings = ("ray.num_cpus=1", "lease_seconds=4")
    first = start(corpus, s3_uri, protector_folder, *settings)
    destination = open_storage(s3_uri)
    wait_until(lambda: list(destination.list(f"{INTERNAL}shards/")), first)
    workers = psutil.Process(first.pid).children()
    for worker in workers:  # so that the first run is not over before the second has begun
        worker.suspend()
    second = start(corpus, s3_uri, protector_folder, *settings)
    _, errors = second.communicate(timeout=120)
    for worker in workers:
        worker.resume()
    assert second.returncode == 75
    assert "is writing to" in errors
    assert "Traceback" not in errors
    printed, _ = first.communicate(timeout=200)
    assert first.returncode == 0
    assert "12 of 12 shards protected" in printed
    assert verify(str(corpus), s3_uri, HERE).ok


@fault("two runs at once on one prefix, without a lease")
def test_two_runs_without_a_lease_are_wasteful_and_harmless(tmp_path, protector_folder):
    corpus = write_corpus(tmp_path / "in", num_shards=6, num_samples=20)
    settings = ("ray.num_cpus=1", "lease_seconds=0")
    runs = [start(corpus, tmp_path / "out", protector_folder, *settings) for _ in range(2)]
    for run in runs:
        _, errors = run.communicate(timeout=200)
        assert run.returncode == 0, errors
    assert verify(str(corpus), str(tmp_path / "out"), HERE).ok
    assert len(list(Ledger(open_storage(str(tmp_path / "out"))).entries())) == 6
    assert not list((tmp_path / "out").rglob("*.one4all-tmp"))


@fault("a run paused past its lease, and the source replaced meanwhile")
def test_run_that_slept_past_its_lease_damages_nothing(tmp_path, protector_folder):
    corpus = write_corpus(tmp_path / "in", num_shards=2, num_samples=60)
    out = tmp_path / "out"
    settings = ("ray.num_cpus=1", "lease_seconds=3")
    sleeper = start(corpus, out, protector_folder, *settings)
    wait_until(lambda: list(out.rglob("*.running")), sleeper)
    driver = psutil.Process(sleeper.pid)
    processes = [driver, *driver.children(recursive=True)]
    for process in processes:
        process.suspend()
    under_way = next(out.rglob("*.running")).parent.name.rpartition("@")[0]
    (corpus / under_way).write_bytes(make_tar(make_samples(9, seed=70)))
    next_run = start(corpus, out, protector_folder, *settings)
    _, errors = next_run.communicate(timeout=200)
    assert next_run.returncode == 0, errors
    assert verify(str(corpus), str(out), HERE).ok
    before = outputs(out)
    for process in processes:
        process.resume()
    _, errors = sleeper.communicate(timeout=200)
    assert sleeper.returncode != 2, errors
    assert "Traceback" not in errors
    assert outputs(out) == before
    assert verify(str(corpus), str(out), HERE).ok


@fault("Ctrl-C or SIGTERM mid-shard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_interrupt_aborts_the_upload_and_can_go_on(
    tmp_path, s3_endpoint, s3_uri, protector_folder, number
):
    corpus = tmp_path / "in"
    corpus.mkdir()
    large = [*make_samples(3), ("zz.bin", os.urandom(3 * PART_BYTES))]
    (corpus / "large.tar").write_bytes(make_tar(large))
    (corpus / "small.tar").write_bytes(make_tar(make_samples(2)))
    destination = open_storage(s3_uri)

    def open_uploads() -> list[str]:
        listed = destination._client.list_multipart_uploads(Bucket=destination._bucket)
        keys = [upload["Key"] for upload in listed.get("Uploads", [])]
        return [key for key in keys if key.startswith(destination._prefix)]

    with FaultProxy(s3_endpoint) as proxy:
        proxy.plan(Fault("latency", "partNumber=2", seconds=20))
        run = start(
            corpus, s3_uri, protector_folder, "ray.num_cpus=1", AWS_ENDPOINT_URL=proxy.endpoint
        )
        wait_until(lambda: any("partNumber=2" in request for request in proxy.requests), run)
        assert open_uploads()
        run.send_signal(number)
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "interrupted; run the same command again" in errors
    assert "Traceback" not in errors
    assert open_uploads() == []
    assert "large.tar" not in outputs(s3_uri)
    if number == signal.SIGINT:
        again = start(corpus, s3_uri, protector_folder, "ray.num_cpus=1")
        _, errors = again.communicate(timeout=120)
        assert again.returncode == 0, errors
        assert verify(str(corpus), s3_uri, HERE).ok

"""Protect for half an hour while the store fails and processes are killed: `make soak`.

A corpus on S3 is protected through a proxy that answers 503, resets and truncates at random. At
random, workers and drivers are killed; whole runs are paused for longer than their lease lives,
while the next one takes over, and wake up beside it; shards of the source are replaced. A round
ends when every shard is protected and nobody sleeps; it is then verified, straight at the server,
and the next begins. Writes report.md, events.json and memory.png.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from support.fault_proxy import Fault, FaultProxy

from one4all.ledger.ledger import Ledger
from one4all.storage import open_storage
from pipelines.bench import make_photo_corpus
from pipelines.local_s3 import local_s3

BUCKET = "soak"
FAULTS = (
    Fault("slow_down", ".", times=None, probability=0.02),
    Fault("truncate", r"GET .*\.tar", times=None, probability=0.1, after_bytes=1_000_000),
    Fault("reset", ".", times=None, probability=0.01),
    Fault("reset_after", "^(PUT|POST)", times=None, probability=0.02),
    Fault("latency", ".", times=None, probability=0.02, seconds=0.5),
)
KILLS = ("worker", "driver", "SIGINT", "SIGTERM", "pause", "replace")
LEASE_SECONDS = 6
PAUSE_SECONDS = (8, 25)
MEAN_SECONDS_BETWEEN_KILLS = 40
SAMPLE_SECONDS = 2.0


@dataclass
class Soak:
    """What happened, in seconds since the start."""

    kills: list[tuple[float, str]] = field(default_factory=list)
    exits: list[tuple[float, int]] = field(default_factory=list)
    memory: list[tuple[float, int, float]] = field(default_factory=list)  # time, pid, MB
    rounds: list[dict[str, object]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    num_done_again: int = 0


@dataclass
class Sleeper:
    """A run whose processes are all stopped, and when they go on."""

    driver: subprocess.Popen[str]
    processes: list[psutil.Process]
    wakes: float

    @classmethod
    def of(cls, driver: subprocess.Popen[str], seconds: float) -> Sleeper:
        driver_process = psutil.Process(driver.pid)
        processes = [driver_process, *driver_process.children(recursive=True)]
        for process in processes:
            with suppress(psutil.Error):
                process.suspend()
        return cls(driver, processes, time.monotonic() + seconds)

    def wake(self) -> None:
        for process in self.processes:
            with suppress(psutil.Error):
                process.resume()
        self.processes = []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", help="folder of shards; default: photos made here")
    parser.add_argument("--shards", type=int, default=200, help="the source repeated to this many")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    soak = Soak()
    with tempfile.TemporaryDirectory() as scratch, local_s3(BUCKET) as endpoint:
        folder = options.source or make_photo_corpus(Path(scratch), images_per_shard=50)
        _upload(folder, options.shards)
        with FaultProxy(endpoint, seed=options.seed) as proxy:
            proxy.plan(*FAULTS)
            run(soak, proxy.endpoint, minutes=options.minutes, seed=options.seed)
        soak.faults = {fault.kind: fault.hits for fault in FAULTS}
    (options.folder / "events.json").write_text(json.dumps(asdict(soak)))
    _plot(soak, options.folder / "memory.png")
    report = _report(soak)
    (options.folder / "report.md").write_text(report)
    print(report)
    return 1 if soak.problems else 0


def run(soak: Soak, endpoint: str, *, minutes: float, seed: int) -> None:
    """Rounds until the time is over; the last one is finished without further kills."""
    chance = random.Random(seed)
    start = time.monotonic()
    deadline = start + 60 * minutes
    number, done = 0, {}
    next_kill = start + chance.expovariate(1 / MEAN_SECONDS_BETWEEN_KILLS)
    while number == 0 or time.monotonic() < deadline:
        number += 1
        destination = f"s3://{BUCKET}/out-{number}"
        done = {}
        sleepers: list[Sleeper] = []
        restless: set[str] = set()  # shards that were replaced, or all of them once a run slept

        def start_run(destination: str = destination) -> subprocess.Popen[str]:
            lease = f"lease_seconds={LEASE_SECONDS}"
            return _one4all("protect", f"s3://{BUCKET}/in", destination, endpoint, "--set", lease)

        while True:
            driver, ended = start_run(), []
            while (current := _at_work(driver, sleepers)) is not None:
                now = time.monotonic()
                soak.memory += [(now - start, *row) for row in _workers(current.pid)]
                for sleeper in sleepers:
                    if now > sleeper.wakes or driver.poll() is not None:
                        sleeper.wake()
                if deadline > now > next_kill:
                    what = chance.choice(KILLS)
                    soak.kills.append((now - start, what))
                    if what == "pause":
                        ended.append(driver)
                        sleepers.append(Sleeper.of(current, chance.uniform(*PAUSE_SECONDS)))
                        restless |= {*done, _replace_a_shard(chance)}
                        driver = start_run()
                    elif what == "replace":
                        restless.add(_replace_a_shard(chance))
                    else:
                        _kill(current, what)
                    next_kill = now + chance.expovariate(1 / MEAN_SECONDS_BETWEEN_KILLS)
                time.sleep(SAMPLE_SECONDS)
            for run in (*ended, driver):
                _, errors = run.communicate()
                soak.exits.append((time.monotonic() - start, run.returncode))
                if "Traceback" in errors:
                    soak.problems.append(f"a stack trace: {errors[-500:]}")
                if run.returncode == 3:
                    soak.problems.append(f"round {number}: shards were given up: {errors[-300:]}")
            done = _compare(soak, destination, done, restless)
            if driver.returncode in (0, 3) and not sleepers:
                break
            sleepers = []
        _verify(soak, number, destination, time.monotonic() - start)


def _one4all(
    verb: str, source: str, destination: str, endpoint: str, *options: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines", verb, source, destination, *options],
        env=os.environ | {"RAY_ADDRESS": "", "AWS_ENDPOINT_URL": endpoint},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _at_work(
    driver: subprocess.Popen[str], sleepers: list[Sleeper]
) -> subprocess.Popen[str] | None:
    """The run to look at: the latest that has not ended, awake or not; None if all have."""
    runs = (*(sleeper.driver for sleeper in sleepers), driver)
    return next((run for run in reversed(runs) if run.poll() is None), None)


def _workers(driver_pid: int) -> list[tuple[int, float]]:
    """Process id and resident megabytes of the shard workers below a driver."""
    found = []
    try:
        for process in psutil.Process(driver_pid).children():
            if "pipelines.local_pool" in " ".join(process.cmdline()):
                found.append((process.pid, process.memory_info().rss / 1e6))
    except psutil.Error:  # gone while we looked
        pass
    return found


def _replace_a_shard(chance: random.Random) -> str:
    """Another shard's content under a name of the source; returns the name."""
    source = open_storage(f"s3://{BUCKET}/in")
    names = [info.key for info in source.list()]
    name, other = chance.sample(names, 2)
    source.write_bytes(name, source.read_bytes(other) + bytes(10240))  # zeros behind the end
    return name


def _kill(driver: subprocess.Popen[str], what: str) -> None:
    if what == "worker":
        for process_id, _ in _workers(driver.pid):
            os.kill(process_id, signal.SIGKILL)
    elif what == "driver":
        driver.kill()
    else:
        driver.send_signal(getattr(signal, what))


def _compare(
    soak: Soak, destination: str, before: dict[str, str], restless: set[str]
) -> dict[str, str]:
    """Who did which shard; what was done must still be done, by the same run, and be visible.

    A shard that was replaced is done again, and one that a sleeper wrote over may be.
    """
    storage = open_storage(destination)
    now = {m.name: m.run_id for m in Ledger(storage).manifests()}
    visible = {info.key for info in storage.list_data()}
    again = {name for name in before if now.get(name) != before[name]}
    soak.num_done_again += len(again)
    soak.problems += [f"{name} was done twice" for name in again - restless]
    soak.problems += [f"{name} is done but not there" for name in now.keys() - visible]
    return now


def _verify(soak: Soak, number: int, destination: str, seconds: float) -> None:
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    check = _one4all("verify", f"s3://{BUCKET}/in", destination, endpoint, "--json")
    printed, errors = check.communicate()
    if check.returncode:
        soak.problems.append(f"round {number}: verify exited {check.returncode}: {errors}")
    found = json.loads(printed) if printed else {}
    client = open_storage(destination)._client
    uploads = client.list_multipart_uploads(Bucket=BUCKET, Prefix=f"out-{number}/")
    if uploads.get("Uploads"):
        soak.problems.append(f"round {number}: {len(uploads['Uploads'])} uploads were left open")
    keys = ("num_shards", "num_images", "num_sidecars", "num_problems", "max_levels")
    soak.rounds.append(
        {"round": number, "seconds": round(seconds)} | {key: found.get(key) for key in keys}
    )


def _upload(folder: str, num_shards: int) -> None:
    shards = sorted(Path(folder).glob("*.tar"))
    source = open_storage(f"s3://{BUCKET}/in")
    for index in range(num_shards):
        source.write_bytes(f"shard-{index:04d}.tar", shards[index % len(shards)].read_bytes())


def _plot(soak: Soak, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5))
    axes = figure.add_subplot()
    for process_id in sorted({row[1] for row in soak.memory}):
        points = [(t / 60, mb) for t, pid, mb in soak.memory if pid == process_id]
        axes.plot(*zip(*points, strict=True), linewidth=1.2)
    for seconds, what in soak.kills:
        axes.axvline(seconds / 60, color="#c44e52", linewidth=0.6, alpha=0.7)
        axes.text(seconds / 60, 20, what, rotation=90, fontsize=6, color="#c44e52")
    axes.set_xlabel("minutes (each line: one worker process; red: kills)")
    axes.set_ylabel("resident memory, MB")
    axes.set_ylim(0)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _report(soak: Soak) -> str:
    last = max((row[0] for row in soak.memory), default=0)
    kills = {what: sum(1 for _, kind in soak.kills if kind == what) for what in KILLS}
    codes = [code for _, code in soak.exits]
    lines = [
        "# Soak",
        "",
        f"{last / 60:.0f} minutes, {len(codes)} runs of protect, {len(soak.kills)} kills {kills}, "
        f"proxy faults {soak.faults}.",
        f"{soak.num_done_again} shards were done again, after they were replaced or a run slept.",
        f"Exit codes: { {code: codes.count(code) for code in sorted(set(codes))} }.",
        f"Peak memory of a worker: {max((row[2] for row in soak.memory), default=0):.0f} MB.",
        "",
        "| round | ended, s | shards | images | sidecars | problems | largest difference |",
        "|---|---|---|---|---|---|---|",
        *("| " + " | ".join(str(value) for value in row.values()) + " |" for row in soak.rounds),
        "",
        *(f"PROBLEM: {problem}" for problem in soak.problems),
        ""
        if soak.problems
        else "Nothing lost, nothing partial, no upload left, every promise held.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

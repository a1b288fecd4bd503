"""Fixtures. None is autouse; whatever is slow to make is made once a session."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings
from support.builders import make_protector
from support.ceph import local_ceph, missing_programs
from support.guarded_s3 import guarded_s3
from support.ray_cluster import Node, RayCluster, ray_cluster

from one4all.protectors.protector import Protector
from one4all.storage import Storage, open_storage
from pipelines import verify as verifying
from pipelines.local_s3 import local_s3
from pipelines.protect import job as protecting
from pipelines.protect.config import ProtectConfig
from pipelines.ray_session import ray_session
from pipelines.settings import RayConfig
from pipelines.verify import VerifyConfig

BUCKET = "one4all-tests"

# The same examples each time, on every machine.
settings.register_profile("same", derandomize=True, database=None)
settings.load_profile("same")


@pytest.fixture(scope="session")
def protector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved protector with random weights."""
    folder = tmp_path_factory.mktemp("protector") / "tiny"
    make_protector().save(folder)
    return folder


@pytest.fixture(scope="session")
def protector(protector_folder: Path) -> Protector:
    return Protector.load(str(protector_folder))


@pytest.fixture
def protect(monkeypatch, protector_folder):
    """`pipelines.protect.job.protect` with its workers in this process."""

    @contextmanager
    def open_runner(job, num_units):
        worker = job.worker(cpus=2, gpus=0, max_starts=1)()
        yield lambda wave: (worker.protect(unit, recorded=recorded) for unit, recorded in wave)

    monkeypatch.setattr(protecting, "open_runner", open_runner)

    def protect(source, destination, **options):
        options = {"protector": str(protector_folder), "batch_size": 4} | options
        return protecting.protect(str(source), str(destination), ProtectConfig(**options))

    return protect


@pytest.fixture
def problems(monkeypatch):
    """What `verify` finds wrong, its tasks in this process; and uploads left open."""

    def audit_all(tasks, num_tasks, source_uri, destination_uri, binding, config):
        for task in tasks:
            yield verifying.audit_one(task, source_uri, destination_uri, binding, config.protector)

    monkeypatch.setattr(verifying, "_audit_all", audit_all)

    def problems(source, destination, **options):
        config = VerifyConfig(**options)
        found = list(verifying.verify(str(source), str(destination), config).problems)
        if (storage := open_storage(str(destination))).uri.startswith("s3"):
            listed = storage._client.list_multipart_uploads(Bucket=storage._bucket)
            uploads = [u["Key"] for u in listed.get("Uploads", [])]
            found += [f"open upload: {k}" for k in uploads if k.startswith(storage._prefix)]
        return found

    return problems


@pytest.fixture(scope="session")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A real S3 server; the process's environment points to it for the session."""
    with local_s3(BUCKET) as endpoint:
        yield endpoint


@pytest.fixture
def s3_uri(s3_endpoint: str) -> str:
    """An empty prefix."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def ceph_variables() -> Iterator[dict[str, str]]:
    """What leads to a Ceph server; not in the environment, which may point to `s3_endpoint`."""
    if missing := missing_programs():
        pytest.skip(f"Ceph is not installed: no {', '.join(missing)}")
    outside = os.environ.copy()
    with local_ceph(BUCKET):
        variables = {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
        with _environment_of(outside, variables):
            yield variables


@pytest.fixture
def ceph_uri(ceph_variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty prefix on the Ceph server, to which the environment points for one test."""
    for name, value in ceph_variables.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@contextmanager
def _environment_of(outside: Mapping[str, str], variables: Mapping[str, str]) -> Iterator[None]:
    """Put back what these variables were outside."""
    with pytest.MonkeyPatch.context() as patch:
        for name in variables:
            if name in outside:
                patch.setenv(name, outside[name])
            else:
                patch.delenv(name)
        yield


@pytest.fixture(scope="session")
def cluster() -> Iterator[RayCluster]:
    """A head without CPUs and two nodes of one CPU each; all find `guarded_s3`, with its key."""
    pytest.importorskip("aiohttp", reason="make test-cluster installs one4all[cluster]")
    outside = os.environ.copy()
    with (
        guarded_s3(BUCKET) as variables,
        ray_cluster(num_nodes=2) as cluster,
        _environment_of(outside, variables),
    ):
        cluster.variables |= variables
        yield cluster


@pytest.fixture
def two_nodes(cluster: RayCluster) -> list[Node]:
    """The nodes beside the head; those that an earlier test lost are replaced."""
    alive = [node for node in cluster.nodes[1:] if node.process.poll() is None]
    return alive + [cluster.add_node() for _ in range(2 - len(alive))]


@pytest.fixture
def cluster_uri(cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty prefix on the cluster's S3 server, to which the environment points for one test."""
    for name, value in cluster.variables.items():
        monkeypatch.setenv(name, value)
    yield f"s3://{BUCKET}/{uuid.uuid4().hex}"
    cluster.end_clients()


@pytest.fixture(
    params=[
        "local",
        pytest.param("s3", marks=pytest.mark.slow),
        pytest.param("ceph", marks=pytest.mark.ceph),
    ]
)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage of each kind."""
    if request.param == "local":
        return open_storage(str(tmp_path / "storage"))
    return open_storage(request.getfixturevalue(f"{request.param}_uri"))


@pytest.fixture(scope="session")
def ray_local(s3_endpoint: str) -> Iterator[None]:
    """One local Ray session; started after the S3 server, so that workers see it."""
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    with ray_session(RayConfig(num_cpus=2)):
        yield


_fault_rows: dict[str, list[str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect the outcome of every test that stands for a row of the fault table."""
    row = dict(report.user_properties).get("fault")
    if row and (report.when == "call" or report.outcome != "passed"):
        _fault_rows.setdefault(row, []).append(report.outcome)


# What starts a server or Ray, and takes seconds to do so.
_SLOW_FIXTURES = {"s3_endpoint", "ray_local", "ceph_variables", "cluster"}
_SLOW_FOLDERS = {"integration", "examples"}


@pytest.hookimpl(tryfirst=True)  # before marks are used to choose
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what starts a server or Ray, and every test of `integration` and `examples`."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & _SLOW_FIXTURES or item.path.parent.name in _SLOW_FOLDERS:
            item.add_marker(pytest.mark.slow)
        if mark := item.get_closest_marker("fault"):
            item.user_properties.append(("fault", mark.args[0]))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the fault table, a row for each fault that was injected in this run."""
    if not _fault_rows:
        return
    lines = ["| fault | result | injections |", "|---|---|---|"]
    for row, outcomes in _fault_rows.items():
        result = "held" if set(outcomes) == {"passed"} else ", ".join(sorted(set(outcomes)))
        lines.append(f"| {row} | {result} | {len(outcomes)} |")
    report = session.config.rootpath / "runs" / "faults.md"
    report.parent.mkdir(exist_ok=True)
    report.write_text("\n".join([*lines, ""]), "utf-8")

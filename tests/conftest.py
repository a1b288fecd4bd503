"""Fixtures. None is autouse; whatever is slow to make is made once a session."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from builders import make_protector

from one4all.protector import Protector
from one4all.storage import Storage, open_storage
from pipelines.config import RayConfig
from pipelines.local_s3 import local_s3
from pipelines.ray_session import ray_session

BUCKET = "one4all-tests"


@pytest.fixture(scope="session")
def protector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved protector with random weights."""
    folder = tmp_path_factory.mktemp("protector") / "tiny"
    make_protector().save(folder)
    return folder


@pytest.fixture(scope="session")
def protector(protector_folder: Path) -> Protector:
    return Protector.load(str(protector_folder))


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


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage of either kind."""
    if request.param == "local":
        return open_storage(str(tmp_path / "storage"))
    return open_storage(request.getfixturevalue("s3_uri"))


@pytest.fixture(scope="session")
def ray_local(s3_endpoint: str) -> Iterator[None]:
    """One local Ray session; started after the S3 server, so that workers see it."""
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    with ray_session(RayConfig(num_cpus=2)):
        yield

"""A cluster of three nodes and a store that asks for a key: nodes are lost, slots overlap."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import write_corpus
from jobs import finish, start

from one4all.ledger import Ledger
from one4all.storage import open_storage
from pipelines.config import VerifyConfig
from pipelines.verify import verify

pytestmark = pytest.mark.cluster


def upload(folder: Path, uri: str) -> str:
    storage = open_storage(uri)
    for path in sorted(folder.iterdir()):
        storage.write_bytes(path.name, path.read_bytes())
    return uri


def wait_until(condition: Callable[[], object], run, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture
def protector(cluster_uri, protector_folder) -> str:
    return upload(protector_folder, f"{cluster_uri}/protector")


def test_protect_survives_the_loss_of_a_node(cluster, cluster_uri, tmp_path, protector):
    corpus = write_corpus(tmp_path / "in", num_shards=10, num_samples=60)
    source = upload(corpus, f"{cluster_uri}/in")
    destination = f"{cluster_uri}/out"
    ledger = Ledger(open_storage(destination))
    job = start(
        cluster, "protect", source, destination, "--protector", protector, "--set", "batch_size=4"
    )
    wait_until(lambda: len(ledger.done()) >= 2, job)
    cluster.lose(cluster.nodes[-1])
    assert len(ledger.done()) < 10, "the node was lost too late"
    code, printed = finish(job)
    assert code == 0, printed
    assert "10 of 10 shards protected" in printed
    assert verify(source, destination, VerifyConfig()).ok

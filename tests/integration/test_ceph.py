"""What moto cannot show: signatures that are checked, requests that race, another make's answers.

The promises of every storage, kept on Ceph too, are in unit/test_storage.py.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from support.builders import fill_corpus, first_unit, make_binding, make_samples, make_tar

from one4all.audit import audit_unit
from one4all.errors import AccessError, ConflictError, NotFoundError
from one4all.ledger.census import take_census
from one4all.ledger.ledger import Ledger
from one4all.protectors.card import load_card
from one4all.storage import open_storage
from one4all.storage.s3 import PART_BYTES
from pipelines.protect.config import ProtectConfig
from pipelines.protect.worker import ProtectWorker

pytestmark = pytest.mark.ceph

NUM_RACERS = 16


@pytest.mark.parametrize(
    ("variable", "code"),
    [
        pytest.param("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch", id="secret"),
        pytest.param("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId", id="key"),
    ],
)
def test_wrong_credentials_are_refused_and_named(ceph_uri, monkeypatch, variable, code):
    storage = open_storage(ceph_uri)
    storage.write_bytes("x", b"mine")
    with monkeypatch.context() as patch:
        patch.setenv(variable, "wrong")
        for use in (
            lambda: storage.check(writable=False),
            lambda: list(storage.list()),
            lambda: storage.read_bytes("x"),
            lambda: storage.create("y", b""),
            lambda: storage.write_bytes("x", b"theirs"),
        ):
            with pytest.raises(AccessError, match=rf"denied \({code}\); check the AWS credentials"):
                use()
        with pytest.raises(AccessError, match=r"denied \(403\)"):
            storage.head("x")  # an answer without a body names no reason
    assert storage.read_bytes("x") == b"mine"


def test_missing_bucket_and_object_are_named(ceph_uri):
    with pytest.raises(AccessError, match="'no-such-bucket' does not exist"):
        open_storage("s3://no-such-bucket/x").check(writable=True)
    with pytest.raises(NotFoundError, match="no such object"):
        open_storage(ceph_uri).read_bytes("x")


def test_one_of_many_creators_wins(ceph_uri):
    storage = open_storage(ceph_uri)
    assert list(storage.list()) == []
    start = threading.Barrier(NUM_RACERS)

    def creates(key: str, racer: int) -> bool:
        start.wait()
        try:
            storage.create(key, str(racer).encode())
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(NUM_RACERS) as pool:
        for key in ("a", "b", "c", "d", "e"):
            won = list(pool.map(creates, [key] * NUM_RACERS, range(NUM_RACERS)))
            assert won.count(True) == 1
            assert storage.read_bytes(key) == str(won.index(True)).encode()


def test_large_object_in_parts_is_read_back_over_broken_connections(ceph_uri):
    storage = open_storage(ceph_uri)
    data = os.urandom(2 * PART_BYTES + 12345)
    storage.write_bytes("x.tar", data)
    received = bytearray()
    with closing(storage.open("x.tar", etag=storage.head("x.tar").etag)) as reader:
        while part := reader.read(1 << 20):
            received += part
            if len(received) % (5 << 20) == 0:
                reader._drop()
    assert received == data


def test_corpus_is_protected_and_verified(ceph_uri, protector_folder):
    source, out = open_storage(f"{ceph_uri}/in"), open_storage(f"{ceph_uri}/out")
    large = ("sample0004.bin", os.urandom(2 * PART_BYTES))  # the shard goes up in parts
    source.write_bytes("s.tar", make_tar([*make_samples(5), large]))
    shard = first_unit(source)
    config = ProtectConfig(protector=str(protector_folder), batch_size=4)
    card = load_card(config.protector)
    binding = make_binding(
        source.uri,
        protector=card.name,
        protector_sha256=card.content_hash,
        epsilon_levels=card.epsilon_levels,
        **config.bound,
    )
    ledger = Ledger(out)
    ledger.bind(binding)
    ledger.bind(binding)  # the next run finds it bound
    worker = ProtectWorker(
        config, source.uri, out.uri, "run", protector_sha256=card.content_hash, num_threads=1
    )
    status = worker.protect(shard)
    assert (status.outcome, status.num_images, status.error) == ("done", 5, "")
    census = take_census(source, ledger)
    assert (census.num_done, census.failing) == (1, {})
    (manifest,) = ledger.manifests()
    audit = audit_unit(shard, manifest, source, out, ledger.binding())
    assert audit.problems == []
    assert (len(audit.images), audit.num_sidecars) == (5, 16)
    assert manifest.outputs[0].etag == out.head("s.tar").etag


@pytest.mark.parametrize("container", ["images", "parquet"])
def test_loose_images_and_tables_are_protected_and_verified(ceph_uri, protect, problems, container):
    source, out = open_storage(f"{ceph_uri}/in"), f"{ceph_uri}/out"
    fill_corpus(source, container)
    result = protect(source.uri, out)
    assert (result.exit_code, result.container, result.num_images) == (0, container, 6)
    assert problems(source.uri, out) == []
    assert protect(source.uri, out).num_protected_now == 0

"""The seam of containers: a second one is a class and a line, and everybody reads and writes it."""

import json
from contextlib import closing
from functools import partial

import numpy as np
import pytest
from support.builders import TINY_ENCODER, make_binding, make_image

import one4all
from one4all.audit import audit_unit
from one4all.corpus import (
    DEFAULT_READ,
    Container,
    Member,
    ObjectVersion,
    OutputObject,
    Sample,
    Unit,
    UnitWriter,
    find_container,
    list_units,
    read_samples,
)
from one4all.corpus.containers import CONTAINERS
from one4all.evaluation.labelled import read_labelled
from one4all.ledger import Ledger, take_census
from one4all.rewrite import RewriteConfig, rewrite_unit
from one4all.storage import INTERNAL, open_storage
from one4all.training.loader import ImageStream, Share
from pipelines.fit import FitConfig, PartEmbedder, _choose_parts


class PairWriter(UnitWriter):
    def __init__(self, destination):
        self._destination, self._files = destination, {}

    def __exit__(self, *exception):
        self._files.clear()

    def copy(self, member):
        self._files[member.name] = member.payload

    def replace(self, member, *, name, payload):
        self._files[name] = payload

    def commit(self):
        outputs = []
        for key, payload in self._files.items():
            with self._destination.writer(key) as sink:
                sink.write(payload)
                etag = sink.commit()
            outputs.append(OutputObject(key, len(payload), etag, sink.sha256.hexdigest()))
        return tuple(outputs)


class Pairs(Container):
    """A loose image and its label are one unit: x.jpg and x.cls."""

    name = "pairs"
    unit_name = "pair of .jpg and .cls"
    noun = "pair"

    def scan(self, source):
        found = {info.key: info for info in source.list() if not info.key.startswith(INTERNAL)}
        for key, info in found.items():
            stem, _, extension = key.rpartition(".")
            if extension == "jpg" and f"{stem}.cls" in found:
                both = (info, found[f"{stem}.cls"])
                parts = tuple(ObjectVersion(i.key, i.size, i.etag) for i in both)
                yield Unit(stem, parts, self.name)
            elif not (extension == "cls" and f"{stem}.jpg" in found):
                yield info

    def read(self, store, unit, options=DEFAULT_READ):
        members = []
        for part in unit.objects:
            with closing(store.open(part.key, etag=part.etag or None)) as reader:
                payload = b"".join(iter(partial(reader.read, 999), b""))
            members.append(Member(name=part.key, payload=payload))
        yield Sample(unit.name, tuple(members))

    def write(self, destination, unit):
        return PairWriter(destination)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setitem(CONTAINERS, Pairs.name, Pairs())
    storage = open_storage(str(tmp_path / "in"))
    for index in range(4):
        storage.write_bytes(f"{index}.jpg", make_image(seed=index))
        storage.write_bytes(f"{index}.cls", str(index % 2).encode())
    storage.write_bytes("README", b"no unit")
    return storage


def test_who_protects_and_who_accounts_know_units_and_not_tar(corpus, protector, tmp_path):
    assert find_container(corpus).name == "pairs"
    destination = open_storage(str(tmp_path / "out"))
    ledger, config = Ledger(destination), RewriteConfig(output_format="match")
    binding = make_binding(corpus.uri, protector_sha256=protector.card.content_hash, **config.bound)
    ledger.bind(binding)
    census = take_census(corpus, ledger)
    assert (census.num_units, census.num_others, census.other) == (4, 1, "README")
    for unit in (unit for unit in census.pending if unit.name != "3"):
        assert ledger.begin_attempt(unit, "run") == 1
        ledger.record(rewrite_unit(unit, corpus, destination, protector, config))
    census = take_census(corpus, ledger)
    assert (census.num_done, [unit.name for unit in census.pending]) == (3, ["3"])
    for manifest in ledger.manifests():
        assert [output.key for output in manifest.outputs] == [
            f"{manifest.name}.jpg",
            f"{manifest.name}.cls",
        ]
        audit = audit_unit(manifest.unit, manifest, corpus, destination, binding)
        assert audit.problems == []
        assert (len(audit.images), audit.num_sidecars) == (1, 1)
    # A changed label is another version of its unit; a spoilt output is found.
    corpus.write_bytes("0.cls", b"1 ")
    assert {unit.name for unit in take_census(corpus, ledger).pending} == {"0", "3"}
    destination.write_bytes("1.cls", b"0")
    spoilt = next(unit for unit in list_units(corpus) if unit.name == "1")
    damaged = take_census(corpus, ledger).damaged
    assert list(damaged) == ["1"]
    manifest = ledger.manifest(damaged["1"])
    problems = audit_unit(spoilt, manifest, corpus, destination, binding).problems
    assert any("1.cls is not the one in its manifest" in problem for problem in problems)


def test_who_learns_reads_it_too(corpus):
    (sample,) = read_samples(corpus, next(list_units(corpus)))
    assert [member.name for member in sample.members] == ["0.jpg", "0.cls"]
    assert read_labelled(corpus.uri, size=16).labels_N.tolist() == [0, 1, 0, 1]
    stream = ImageStream([corpus.uri], size=16)
    batch = next(stream.batches(4, (Share(0, 0, 1),)))
    assert batch.image_BHWC.shape == (4, 16, 16, 3)
    config = FitConfig(source=corpus.uri, encoder=TINY_ENCODER)
    embedder = PartEmbedder(config.model_dump_json())
    found = [embedder.embed(part) for part in _choose_parts(config)]
    assert np.concatenate([part.embeddings for part in found]).shape[0] == 4


def test_a_pair_reaches_a_worker_and_is_read_there(corpus):
    unit = next(list_units(corpus))
    again = Unit.from_json(json.loads(json.dumps(unit.to_json())))
    assert again == unit
    assert [s.key for s in one4all.read_samples(corpus, again)] == ["0"]

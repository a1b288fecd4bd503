"""Fitting a codebook, here and by Ray: no labels, bad images counted, the result protects."""

from pathlib import Path

import pytest
from support.builders import (
    TINY_ENCODER,
    make_image,
    make_pixels,
    make_samples,
    make_tar,
    read_members,
    write_corpus,
)

from one4all.errors import UsageError
from one4all.protectors.config import CodebookConfig
from one4all.protectors.protector import Protector
from pipelines.fit import PICTURE, FitConfig, PartEmbedder, _choose_parts, describe, fit
from pipelines.protect.config import ProtectConfig
from pipelines.protect.job import protect
from pipelines.verify import VerifyConfig, verify


def config_for(source: Path | str, output: Path | str, **changes) -> FitConfig:
    return FitConfig(
        **{"runner": "local", "num_workers": 1} | changes,
        source=str(source),
        output=str(output),
        encoder=TINY_ENCODER,
        codebook=CodebookConfig(num_concepts=3, pattern="strong"),
    )


@pytest.mark.parametrize("runner", ["local", "ray"])
def test_fitted_codebook_protects_its_corpus_and_what_comes_later(tmp_path, request, runner):
    if runner == "ray":
        request.getfixturevalue("ray_local")
    corpus = write_corpus(tmp_path / "in", num_shards=2)
    (corpus / "bad.tar").write_bytes(make_tar([("a.jpg", make_image()), ("b.jpg", b"junk")]))
    config = config_for(corpus, tmp_path / "book", runner=runner)
    shards = []
    result = fit(config, command="one4all fit", on_shard=shards.append)
    assert (result.num_images, result.num_bad, sum(result.sizes_K)) == (11, 1, 11)
    assert len(shards) == 3
    assert (tmp_path / "book" / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert "1 could not be read" in describe(result, config)
    assert not result.bad_shards

    out = str(tmp_path / "out")
    settings = ProtectConfig(
        protector=config.output, cpus_per_worker=1, output_format="lossless", runner=runner
    )
    (corpus / "bad.tar").unlink()
    assert protect(str(corpus), out, settings).exit_code == 0
    (corpus / "later.tar").write_bytes(make_tar(make_samples(5, seed=70)))
    assert protect(str(corpus), out, settings).num_protected_now == 1
    audit = verify(str(corpus), out, VerifyConfig())
    assert audit.ok, audit.problems
    assert audit.num_within_budget == audit.num_images == 15


def test_labels_and_repetition_do_not_matter(tmp_path):
    corpus = write_corpus(tmp_path / "in", num_shards=2)
    bare = tmp_path / "bare"
    bare.mkdir()
    for shard in corpus.glob("*.tar"):
        members = read_members(shard.read_bytes())
        pictures = [(name, data) for name, data in members.items() if name.endswith(".jpg")]
        (bare / shard.name).write_bytes(make_tar(pictures))
    hashes = {
        fit(config_for(source, tmp_path / f"book-{number}")).card.weights_sha256
        for number, source in enumerate((corpus, corpus, bare))
    }
    assert len(hashes) == 1


def test_codebook_of_names_sees_no_image_and_protects_any(tmp_path):
    config = config_for("vocabulary:broad", tmp_path / "names")
    result = fit(config)
    assert (result.num_images, sum(result.sizes_K)) == (0, 30)
    assert f"{len(result.sizes_K)} patterns of names" in describe(result, config)
    assert len(result.sizes_K) > 10  # like names share one
    protector = Protector.load(config.output)
    assert protector.card.vocabulary == "broad"
    clean = make_pixels(50, 60)
    difference = protector.protect([clean])[0].astype(int) - clean
    assert abs(difference).max() == 8


def test_damaged_shard_is_left_out_and_named(tmp_path):
    corpus = write_corpus(tmp_path / "in", num_shards=2)
    whole = (corpus / "shard-001.tar").read_bytes()
    (corpus / "shard-001.tar").write_bytes(whole[: len(whole) // 2])
    config = config_for(corpus, tmp_path / "book")
    result = fit(config)
    assert result.num_images == 5
    assert [Path(name).name for name in result.bad_shards] == ["shard-001.tar"]
    assert "left out: " in describe(result, config)
    (corpus / "shard-000.tar").write_bytes(whole[:700])
    with pytest.raises(
        UsageError, match=r"concepts cannot be found in 0 images.*\n.*shard-000.tar"
    ):
        fit(config)


def test_shard_that_went_away_is_left_out_and_named(tmp_path):
    corpus = write_corpus(tmp_path / "in", num_shards=3)
    embedder = PartEmbedder(config_for(corpus, tmp_path / "book").model_dump_json())
    part = _choose_parts(config_for(corpus, tmp_path / "book"))[1]
    assert len(embedder.embed(part).embeddings) == 5
    (corpus / "shard-001.tar").unlink()
    found = embedder.embed(part)
    assert len(found.embeddings) == 0
    assert "no such file" in found.error


def test_masks_and_depth_maps_are_not_learnt_as_photos(tmp_path):
    corpus = tmp_path / "in"
    corpus.mkdir()
    files = []
    for index in range(4):
        files.append((f"{index}.jpg", make_image(seed=index)))
        files.append((f"{index}.seg.png", make_image("PNG", seed=index + 50)))
    (corpus / "a.tar").write_bytes(make_tar(files))
    everything = fit(config_for(corpus, tmp_path / "all"))
    photos = fit(config_for(corpus, tmp_path / "photos", sidecar_patterns=("*.seg.png",)))
    assert (everything.num_images, photos.num_images) == (8, 4)


def test_sample_is_drawn_evenly_from_every_shard(tmp_path):
    corpus = write_corpus(tmp_path / "in", num_shards=3)
    result = fit(config_for(corpus, tmp_path / "book", images_per_shard=2))
    assert result.num_images == 6


def test_too_few_images_and_no_shards_are_refused_and_leave_nothing(tmp_path):
    corpus = write_corpus(tmp_path / "in", num_shards=1, num_samples=2)
    with pytest.raises(UsageError, match="3 concepts cannot be found in 2 images"):
        fit(config_for(corpus, tmp_path / "book"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no \.tar shard"):
        fit(config_for(tmp_path / "empty", tmp_path / "book"))
    with pytest.raises(UsageError, match="needs a source"):
        fit(config_for("", tmp_path / "book"))
    with pytest.raises(Exception, match="no protector"):
        Protector.load(str(tmp_path / "book"))

"""Corpora become shards that say what they hold."""

import json
import os
from collections import Counter
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.builders import make_image, read_members
from typer import BadParameter

from one4all.corpus.packing import embedded_corpora, open_corpus, pack
from one4all.errors import AccessError, ConfigError, UsageError
from one4all.images import decode
from one4all.storage import open_storage
from pipelines.cli.learning import pack as pack_verb

PHOTOS = Path(str(files("one4all"))) / "assets" / "corpora" / "caltech-photos.parquet"


def pack_to(folder, images, **options):
    return pack(images, open_storage(str(folder)), prefix="train", **options)


def test_embedded_emoji_have_different_concepts_two_label_sets_and_a_fixed_split():
    concepts = {}
    for name in ("emoji-nature", "emoji-things"):
        keys = {}
        for split in ("train", "test"):
            images = list(open_corpus(name, split=split))
            keys[split] = {image.key for image in images}
            assert len(keys[split]) == len(images)
            assert decode(images[0].data).pixels.shape == (64, 64, 3)
        assert not keys["train"] & keys["test"]
        fine = list(open_corpus(name, labels="fine"))
        coarse = list(open_corpus(name))
        assert len({i.label for i in coarse}) >= 10
        assert len({i.label for i in fine}) > 5 * len({i.label for i in coarse})
        concepts[name] = {image.label_name for image in fine}
    assert not concepts["emoji-nature"] & concepts["emoji-things"]


def test_embedded_photos_are_small_and_none_of_the_test_is_nearly_one_of_the_training():
    assert embedded_corpora() == ["caltech-photos", "emoji-nature", "emoji-things"]
    assert PHOTOS.stat().st_size < 8_000_000
    seen, counts = {}, {}
    for split in ("train", "test"):
        images = list(open_corpus("caltech-photos", split=split))
        pixels = [decode(image.data).pixels for image in images]
        assert all(max(p.shape[:2]) <= 128 and p.shape[2] == 3 for p in pixels)
        counts[split] = Counter(image.label_name for image in images)
        seen[split] = np.stack([_look(p) for p in pixels])
    assert sum(counts["train"].values()) + sum(counts["test"].values()) == 1513
    assert len(counts["train"]) == 25
    assert all(counts["test"][name] >= 9 for name in counts["train"])
    alike = (seen["train"] @ seen["test"].T).max()
    mirrored = seen["test"].reshape(-1, 16, 16, 3)[:, :, ::-1].reshape(len(seen["test"]), -1)
    assert max(alike, (seen["train"] @ mirrored.T).max()) < 0.96
    with pytest.raises(ConfigError, match="'caltech-photos' has one set of labels"):
        next(open_corpus("caltech-photos", labels="fine"))


def _look(pixels):
    """An image as a vector of length 1; the product of two is their correlation."""
    small = np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BOX), float)
    small = small.ravel() - small.mean()
    return small / np.linalg.norm(small)


def test_packed_shards_hold_image_class_text_and_json(tmp_path):
    from itertools import islice

    images = list(islice(open_corpus("emoji-nature"), 7))
    assert pack_to(tmp_path / "a", images, images_per_shard=3) == (3, 7)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [f"train-{i:06d}.tar" for i in range(3)]
    members = read_members((tmp_path / "a" / names[0]).read_bytes())
    key = images[0].key
    assert members[f"{key}.webp"] == images[0].data
    assert members[f"{key}.cls"] == str(images[0].label).encode()
    assert members[f"{key}.txt"].decode() == images[0].label_name
    assert json.loads(members[f"{key}.json"])["style"]
    pack_to(tmp_path / "b", images, images_per_shard=3)
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_image_folder_that_cannot_be_read_whole_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "images"
    (folder / "cat" / "sub").mkdir(parents=True)
    (folder / "cat" / "sub" / "a.jpg").write_bytes(make_image())
    linked = folder / "cat" / "linked"
    linked.symlink_to(folder / "cat")
    with pytest.raises(AccessError, match="cat/linked leads back"):
        list(open_corpus(str(folder)))
    linked.unlink()
    (folder / "cat" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(make_image())
    with pytest.raises(UsageError, match=r"cat/caf\\xe9\.jpg has a name that is not UTF-8"):
        list(open_corpus(str(folder)))
    scandir = os.scandir

    def refuse(place):
        if Path(place).name == "sub":
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(AccessError, match="cat/sub cannot be read by this user"):
        list(open_corpus(str(folder)))


def test_image_folder_is_packed_without_encoding_again(tmp_path):
    for label, name in enumerate(("cat", "dog.v2")):
        folder = tmp_path / "images" / name / "sub"
        folder.mkdir(parents=True)
        (folder / "one.two.JPG").write_bytes(make_image(seed=label))
        (folder / "notes.txt").write_text("no image")
    images = list(open_corpus(str(tmp_path / "images")))
    assert [(i.key, i.label, i.label_name) for i in images] == [
        ("cat/sub/one_two", 0, "cat"),
        ("dog.v2/sub/one_two", 1, "dog.v2"),
    ]
    pack_to(tmp_path / "out", images)
    members = read_members((tmp_path / "out" / "train-000000.tar").read_bytes())
    assert members["cat/sub/one_two.jpg"] == make_image(seed=0)


def test_files_that_differ_only_by_extension_get_keys_of_their_own(tmp_path):
    folder = tmp_path / "images" / "cat"
    folder.mkdir(parents=True)
    for name in ("a.jpg", "a.png", "._a.jpg"):
        (folder / name).write_bytes(make_image())
    (tmp_path / "images" / ".cache").mkdir()
    keys = [image.key for image in open_corpus(str(tmp_path / "images"))]
    assert keys == ["cat/a", "cat/a_png"]


def photos(root: Path, **counts: int) -> Path:
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            (root / name / f"{index:02d}.png").write_bytes(
                make_image("PNG", size=(8, 8), seed=100 * label + index)
            )
    return root


def test_folder_is_split_by_class_and_twins_are_on_no_two_sides(tmp_path):
    root = photos(tmp_path / "in", cat=10, dog=20, elk=1)
    for twin in ("cat/99.png", "dog/99.png", "elk/99.png"):
        (root / twin).write_bytes((root / "cat" / "03.png").read_bytes())
    twins = {}

    def side(split: str, **options) -> list:
        options = {"test_share": 0.2, "on_duplicate": twins.__setitem__} | options
        return list(open_corpus(str(root), split=split, **options))

    train, test = side("train"), side("test")
    assert twins == dict.fromkeys(("cat/99.png", "dog/99.png", "elk/99.png"), "cat/03.png")
    assert Counter(image.label_name for image in test) == {"cat": 2, "dog": 4}
    assert Counter(image.label_name for image in train) == {"cat": 8, "dog": 16, "elk": 1}
    assert not {image.data for image in train} & {image.data for image in test}
    assert side("test") == test
    assert {i.key for i in side("test", seed=1)} != {i.key for i in test}
    assert {i.key for i in side("test", shuffle=True)} == {i.key for i in test}
    with pytest.raises(ConfigError, match="'emoji-nature' has a split of its own"):
        open_corpus("emoji-nature", test_share=0.2)


def test_pack_writes_both_sides_of_a_split_and_says_what_it_left_out(tmp_path, capsys):
    root = photos(tmp_path / "in", cat=4, dog=4)
    (root / "dog" / "twin.png").write_bytes((root / "dog" / "00.png").read_bytes())
    pack_verb(str(root), str(tmp_path / "out"), split="0.25")
    for side, count in (("train", 6), ("test", 2)):
        shard = tmp_path / "out" / side / f"{side}-000000.tar"
        members = read_members(shard.read_bytes())
        assert sum(name.endswith(".png") for name in members) == count
    said = capsys.readouterr().out
    assert "left out as copies of others: 1, such as dog/twin.png of dog/00.png" in said
    with pytest.raises(BadParameter, match="between 0 and 1, not 20"):
        pack_verb(str(root), str(tmp_path / "two"), split="20")


@pytest.mark.parametrize("source", ["folder", "emoji-nature"])
def test_shuffled_corpus_is_the_same_in_another_order(tmp_path, source):
    place = str(photos(tmp_path, cat=10, dog=10)) if source == "folder" else source
    images, shuffled, again, other = (
        list(open_corpus(place, **options))
        for options in ({}, {"shuffle": True}, {"shuffle": True}, {"shuffle": True, "seed": 1})
    )
    assert shuffled == again
    assert sorted(i.key for i in shuffled) == sorted(i.key for i in images)
    assert len({tuple(i.key for i in found) for found in (images, shuffled, other)}) == 3
    assert len({i.label for i in shuffled[:10]}) > 1


@pytest.mark.slow
def test_torchvision_set_of_files_is_packed_from_its_files(tmp_path):
    """The real OxfordIIITPet class on a tiny copy of its layout."""
    base = tmp_path / "oxford-iiit-pet"
    (base / "images").mkdir(parents=True)
    (base / "annotations").mkdir()
    lines = []
    for index, name in enumerate(("Abyssinian_1", "Bengal_2")):
        (base / "images" / f"{name}.jpg").write_bytes(make_image(seed=index))
        lines.append(f"{name} {index + 1} 1 1")
    (base / "annotations" / "trainval.txt").write_text("\n".join(lines))
    images = list(open_corpus("torchvision:OxfordIIITPet", root=tmp_path))
    assert [image.data for image in images] == [make_image(seed=0), make_image(seed=1)]
    assert [(i.label, i.label_name, i.extension) for i in images] == [
        (0, "Abyssinian", "jpg"),
        (1, "Bengal", "jpg"),
    ]


def test_torchvision_set_of_pixels_is_packed_as_png(tmp_path, monkeypatch):
    from torchvision import datasets

    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)

    class Tiny:
        classes = ("airplane", "automobile")

        def __init__(self, root, train, download):
            assert train

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return Image.fromarray(pixels[index]), index

    monkeypatch.setattr(datasets, "CIFAR10", Tiny)
    images = list(open_corpus("torchvision:CIFAR10", root=tmp_path))
    np.testing.assert_array_equal(decode(images[1].data).pixels, pixels[1])
    assert (images[1].label_name, images[1].extension) == ("automobile", "png")


def test_mistakes_are_explained(tmp_path):
    with pytest.raises(UsageError, match="emoji-nature, emoji-things"):
        open_corpus("emoji")
    with pytest.raises(UsageError, match="OxfordIIITPet"):
        list(open_corpus("torchvision:Pets"))
    with pytest.raises(UsageError, match="cannot open Food101"):
        list(open_corpus("torchvision:Food101", root=tmp_path))
    with pytest.raises(ConfigError, match="only embedded emoji have 'fine'"):
        open_corpus(str(tmp_path), labels="fine")
    with pytest.raises(UsageError, match="holds no images"):
        pack_to(tmp_path / "empty", [])
    images = list(open_corpus("emoji-nature"))[:1]
    pack_to(tmp_path / "full", images)
    with pytest.raises(UsageError, match="already holds"):
        pack_to(tmp_path / "full", images)

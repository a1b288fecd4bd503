"""The demo on photos of one's own: what it trains and tests on."""

import pytest
from support.builders import make_image

from one4all.errors import ShardError, UsageError
from one4all.evaluation.labelled import read_corpus
from pipelines.demo import photos


def folder_of(root, counts: dict[str, int]) -> str:
    for name, count in counts.items():
        (root / name).mkdir()
        for index in range(count):
            (root / name / f"{index}.png").write_bytes(make_image(seed=index))
    return str(root)


def test_every_fifth_photo_of_a_class_is_held_out_for_the_test(tmp_path):
    material = photos(folder_of(tmp_path, {"cat": 12, "dog": 5, "rare": 4}))
    keys = {split: [image.key for image in material.images(split)] for split in ("train", "test")}
    assert len(keys["test"]) == 3
    assert {key.partition("/")[0] for key in keys["test"]} == {"cat", "dog"}
    assert len(set(keys["train"]) | set(keys["test"])) == len(keys["train"]) + 3 == 21


@pytest.mark.parametrize("counts", [{"cat": 20}, {"cat": 20, "dog": 4}])
def test_photos_of_one_class_are_refused_before_anything_starts(tmp_path, counts):
    with pytest.raises(UsageError, match="fewer than two classes of 5 photos or more"):
        photos(folder_of(tmp_path, counts))


def test_photo_that_cannot_be_read_is_named(tmp_path):
    folder = folder_of(tmp_path, {"cat": 5, "dog": 5})
    (tmp_path / "dog" / "2.png").write_bytes(b"garbage")
    images = photos(folder).images("train")
    with pytest.raises(ShardError, match="mine: sample 'dog/2': not an image file"):
        read_corpus(images, "mine", size=8)

"""The stream of training images, a training step, and the controls."""

import json
import re
import shutil
import tarfile
import threading
import time
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from support.builders import TINY_ENCODER, TINY_GENERATOR, make_image, make_tar, write_corpus
from torch.utils._python_dispatch import TorchDispatchMode

from one4all.errors import ConfigError, NotFiniteError, StorageError, UsageError
from one4all.evaluation.methods.controls import class_patterns, uniform_noise
from one4all.perturbation import apply_perturbation
from one4all.protectors.kinds import KINDS, Kind
from one4all.protectors.model import PerturbationModel
from one4all.protectors.protector import Protector
from one4all.storage import LocalStorage
from one4all.training import loader
from one4all.training.cost import cost_of_an_image
from one4all.training.loader import Batch, ImageStream, Mark, Share, Shares, deal
from one4all.training.trainer import GeneratorTrainer, TrainerConfig
from pipelines.train.worker import one_failure

ALONE = (Share(0, 0, 1),)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return str(write_corpus(tmp_path_factory.mktemp("corpus") / "c", num_shards=3, num_samples=8))


def take(corpus, count, *, batch_size=4, shares: Shares = ALONE, **options):
    """Some batches, as what is left after each, and its images."""
    stream = ImageStream([corpus], size=16, **options)
    with closing(stream.batches(batch_size, shares)) as batches:
        return [(batch.shares, batch.image_BHWC.numpy()) for batch in islice(batches, count)]


def payloads_of(stream: ImageStream, share: Share) -> list[bytes]:
    """Encoded images of a share, in its order."""
    return [image.payload for image in stream.encoded(share)]


# --- loader ----------------------------------------------------------------------------------


def test_stream_is_the_same_every_time_and_goes_on_where_it_stopped(corpus):
    whole = take(corpus, 9)
    assert [(share.epoch, share.position) for (share,), _ in whole[:7]] == [
        (0, 4), (0, 8), (0, 12), (0, 16), (0, 20), (0, 24), (1, 4),
    ]  # fmt: skip
    resumed = take(corpus, 5, shares=whole[3][0])
    for (shares1, image1), (shares2, image2) in zip(whole[4:], resumed, strict=True):
        assert shares1 == shares2
        np.testing.assert_array_equal(image1, image2)


@pytest.mark.parametrize("count", [1, 2, 9], ids=lambda n: f"{n} ranks")
def test_resumed_stream_reads_no_shard_that_was_done_with(tmp_path, monkeypatch, count):
    """Wherever it is resumed, in a world with more ranks than shards, too: it opens the
    shards that were open there, and then those that come after them."""
    corpus = str(write_corpus(tmp_path / "c", num_shards=6, num_samples=12))
    opened: list[str] = []

    def noted(self, key, **options):
        opened.append(key)
        return open_file(self, key, **options)

    def run(shares: Shares, num_batches: int) -> list[Batch]:
        opened.clear()
        stream = ImageStream([corpus], size=8, open_shards=2, shuffle_buffer=3)
        with closing(stream.batches(2, shares)) as batches:
            return list(islice(batches, num_batches))

    open_file = LocalStorage.open
    monkeypatch.setattr(LocalStorage, "open", noted)
    share = Share(0, count - 1, count)
    num_batches = len(payloads_of(ImageStream([corpus], size=8), share)) // 2
    whole = run((share,), num_batches + 2)
    order = list(opened)
    for done in range(num_batches):
        found = run(whole[done].shares, num_batches + 1 - done)
        for expected, batch in zip(whole[done + 1 :], found, strict=True):
            assert batch.shares == expected.shares
            assert batch.names == expected.names
            assert torch.equal(batch.image_BHWC, expected.image_BHWC)
        mark = whole[done].shares[0].mark
        wanted = [order[place] for place, _ in mark.open_units] + order[mark.num_opened :]
        assert all(a == b for a, b in zip(opened, wanted, strict=False))
    assert mark.num_opened - len(mark.open_units) > 0, "no shard was done with"


def test_order_does_not_depend_on_who_is_faster(corpus, monkeypatch):
    expected = take(corpus, 9, shuffle_buffer=5)
    read, crop = ImageStream._samples, ImageStream._crop
    delays = np.random.default_rng(0)

    def slow_samples(self, uri, unit):
        for sample in read(self, uri, unit):
            time.sleep(delays.uniform(0, 0.004))
            yield sample

    def slow_crop(self, *arguments):
        time.sleep(delays.uniform(0, 0.004))
        return crop(self, *arguments)

    monkeypatch.setattr(ImageStream, "_samples", slow_samples)
    monkeypatch.setattr(ImageStream, "_crop", slow_crop)
    for (shares1, image1), (shares2, image2) in zip(
        expected, take(corpus, 9, shuffle_buffer=5, num_threads=4), strict=True
    ):
        assert shares1 == shares2
        np.testing.assert_array_equal(image1, image2)


def test_next_block_is_read_while_this_one_is_decoded_and_no_further(corpus, monkeypatch):
    read_ahead, num_read = threading.Event(), 0
    read, crop = ImageStream._images, ImageStream._crop

    def counted(self, uri, unit):
        nonlocal num_read
        for image in read(self, uri, unit):
            num_read += 1
            if num_read > 5:
                read_ahead.set()
            yield image

    def waiting(self, *arguments):
        assert read_ahead.wait(20), "reading waits for decoding"
        return crop(self, *arguments)

    monkeypatch.setattr(ImageStream, "_images", counted)
    monkeypatch.setattr(ImageStream, "_crop", waiting)
    stream = ImageStream([corpus], size=16, shuffle_buffer=5)
    with closing(stream.batches(2, ALONE)) as batches:
        for _ in range(2):  # and the third, which begins the second block, is prepared
            next(batches)
        time.sleep(0.3)
        assert num_read <= 3 * 5
    assert not [thread.name for thread in threading.enumerate() if "reader" in thread.name]


def test_error_of_a_store_comes_out_of_the_thread_that_reads(corpus, monkeypatch):
    def fail(self, uri, unit):
        yield from islice(read(self, uri, unit), 3)
        raise StorageError("the store is down")

    read = ImageStream._samples
    monkeypatch.setattr(ImageStream, "_samples", fail)
    with pytest.raises(StorageError, match="the store is down"):
        take(corpus, 9, shuffle_buffer=4)
    assert not [thread.name for thread in threading.enumerate() if "reader" in thread.name]


def test_units_take_turns_and_large_images_make_smaller_blocks(corpus, monkeypatch):
    stream = ImageStream([corpus], size=16, open_shards=3, shuffle_buffer=1)
    units = [image.unit for image in stream.encoded(Share(0, 0, 1))]
    assert all(len(set(units[i : i + 3])) == 3 for i in range(0, 24, 3))
    monkeypatch.setattr(loader, "SHUFFLE_BYTES", 2 * 5000)
    blocks = list(ImageStream([corpus], size=16)._blocks_of(Share(0, 0, 1)))
    assert len(blocks) > 3
    for block in blocks[:-1]:
        sizes = [len(image.payload) for image in block.images]
        assert 5000 <= sum(sizes) < 5000 + max(sizes)


def test_place_in_a_checkpoint_is_plain_numbers_and_may_be_of_before():
    share = Share(3, 1, 4, 17, Mark(12, 5, 49, ((2, 3), (4, 1))))
    assert Share.from_list(json.loads(json.dumps(share.to_list()))) == share
    assert Share.from_list([3, 1, 4, 17]) == Share(3, 1, 4, 17)


def test_epochs_and_seeds_differ(corpus):
    first, other_seed = take(corpus, 7), take(corpus, 1, seed=1)
    assert not np.array_equal(first[0][1], first[6][1])
    assert not np.array_equal(first[0][1], other_seed[0][1])


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_an_epoch_without_loss_or_repetition(corpus, world_size):
    """More ranks than shards included; told by the payloads, before any random crop."""
    stream = ImageStream([corpus], size=16)
    parts = [payloads_of(stream, Share(0, rank, world_size)) for rank in range(world_size)]
    payloads = [payload for part in parts for payload in part]
    assert len(payloads) == 24
    assert len(set(payloads)) == 24
    assert min(len(part) for part in parts) >= 4


@pytest.mark.parametrize("sizes", [(2, 3), (3, 1), (2, 3, 1), (1, 2, 3, 2), (3, 3)], ids=str)
def test_every_image_counts_once_an_epoch_whatever_becomes_of_the_ranks(corpus, sizes):
    """Ranks go at paces of their own; what each has done is told by payload and epoch."""
    stream = ImageStream([corpus], size=16)
    seen: list[tuple[int, bytes]] = []

    def work(shares: Shares, count: int) -> Shares:
        share, *later = shares
        part = payloads_of(stream, share)
        seen.extend((share.epoch, payload) for payload in part[share.position :][:count])
        if share.position + count < len(part):
            return (replace(share, position=share.position + count), *later)
        done = len(part) - share.position
        following = tuple(later) or (replace(share, epoch=share.epoch + 1, position=0),)
        return work(following, count - done) if count > done else (
            replace(share, position=len(part)), *later
        )  # fmt: skip

    of_ranks: list[Shares] = []
    for size in sizes:
        of_ranks = [work(shares, 5 + 4 * r) for r, shares in enumerate(deal(of_ranks, size))]
    # Give everybody the rest of the epoch that is furthest behind, and of those before it.
    for shares in deal(of_ranks, 7):
        for share in shares[:-1]:
            seen += [(share.epoch, p) for p in payloads_of(stream, share)[share.position :]]
    assert len(seen) == len(set(seen))
    epochs = 1 + max(epoch for epoch, _ in seen)
    assert len(seen) == 24 * epochs


def test_dealing_changes_nothing_while_the_number_of_ranks_is_the_same():
    assert deal([], 2) == [(Share(0, 0, 2),), (Share(0, 1, 2),)]
    of_ranks = [(Share(3, 0, 2, 7),), (Share(2, 1, 2, 30), Share(3, 1, 2))]
    assert deal(of_ranks, 2) == of_ranks
    assert deal([(Share(0, 0, 2),), (Share(0, 1, 2),)], 1) == [(Share(0, 0, 1),)]


def test_masks_and_depth_maps_are_not_learnt_as_photos(tmp_path):
    photo, mask = make_image(), make_image("PNG")
    members = [(f"{i}.{name}", data) for i in range(4) for name, data in
               (("jpg", photo), ("seg.png", mask), ("depth.png", mask))]  # fmt: skip
    (tmp_path / "shard-000.tar").write_bytes(make_tar(members))
    stream = ImageStream([str(tmp_path)], size=16, sidecar_patterns=("*.seg.png", "*.depth.png"))
    assert payloads_of(stream, Share(0, 0, 1)) == [photo] * 4
    config = config_for(str(tmp_path), sidecar_patterns=["*.png"])
    assert payloads_of(GeneratorTrainer(config).stream, Share(0, 0, 1)) == [photo] * 4


def test_too_few_images_are_named(corpus, tmp_path):
    with pytest.raises(UsageError, match="24 images, not enough"):
        take(corpus, 1, batch_size=25)
    junk = tmp_path / "junk"
    junk.mkdir()
    (junk / "s.tar").write_bytes(make_tar([(f"{i}.heic", b"junk") for i in range(9)]))
    with pytest.raises(UsageError, match="9 images, not enough that can be read"):
        take(str(junk), 1)
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="one4all pack makes some"):
        ImageStream([str(tmp_path / "none")], size=16)


def damage(corpus: str, tmp_path, kind: str) -> str:
    """A copy of a corpus whose second shard is damaged; it holds eight images."""
    copy = tmp_path / kind
    shutil.copytree(corpus, copy)
    shard = copy / "shard-001.tar"
    data = shard.read_bytes()
    if kind == "cut":
        shard.write_bytes(data[: len(data) // 2])
    elif kind == "garbled":
        with tarfile.open(shard) as archive:
            header = archive.getmembers()[12].offset
        shard.write_bytes(data[:header] + b"x" * 512 + data[header + 512 :])
    else:
        shard.write_bytes(b"")
    return str(copy)


@pytest.mark.parametrize("kind", ["cut", "garbled", "empty", "gone"])
def test_damaged_shard_is_left_out_from_its_damage_on_and_named(corpus, tmp_path, kind):
    where = damage(corpus, tmp_path, kind)
    stream = ImageStream([where], size=16)
    if kind == "gone":
        (Path(where) / "shard-001.tar").unlink()
    parts = [payloads_of(stream, Share(0, rank, 2)) for rank in range(2)]
    payloads = [payload for part in parts for payload in part]
    whole = payloads_of(ImageStream([corpus], size=16), Share(0, 0, 1))
    assert len(payloads) == len(set(payloads))
    assert set(payloads) < set(whole)
    assert 16 <= len(payloads) < 24
    assert (len(payloads) > 16) == (kind in ("cut", "garbled"))
    [(uri, reason)] = stream.damaged.items()
    assert uri == f"{where}/shard-001.tar"
    assert re.search({"garbled": "garb", "gone": "no such"}.get(kind, "truncated"), reason)


def test_stream_with_a_damaged_shard_goes_on_where_it_stopped(corpus, tmp_path):
    where = damage(corpus, tmp_path, "cut")
    whole = take(where, 9)
    assert whole[8][0][0].epoch == 1
    resumed = take(where, 5, shares=whole[3][0])
    for (shares1, image1), (shares2, image2) in zip(whole[4:], resumed, strict=True):
        assert shares1 == shares2
        np.testing.assert_array_equal(image1, image2)


def test_rank_that_draws_nothing_but_damage_goes_on_with_the_next_epoch(corpus, tmp_path):
    where = damage(corpus, tmp_path, "empty")
    ranks = [take(where, 4, batch_size=8, shares=(Share(0, rank, 3),)) for rank in range(3)]
    epochs = [[share.epoch for (share,), _ in batches] for batches in ranks]
    assert any(numbers != [0, 1, 2, 3] for numbers in epochs), "no rank has met the damage"
    assert all(numbers == sorted(set(numbers)) for numbers in epochs)


def test_training_ends_where_damage_leaves_too_little(corpus, tmp_path):
    where = tmp_path / "cut"
    shutil.copytree(corpus, where)
    for shard in where.glob("*.tar"):
        shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(
        UsageError, match=r"finds 0 images, .* damaged: .*tar \(trunc.*, and 2 more"
    ):
        take(str(where), 1)


# --- images that are only looked at ------------------------------------------------------------


def test_a_share_of_the_shards_is_kept_from_learning(tmp_path):
    corpus = str(write_corpus(tmp_path / "c", num_shards=5, num_samples=4))

    def units_of(part: tuple[float, float], seed: int = 0) -> set[str]:
        stream = ImageStream([corpus], size=8, part=part, seed=seed)
        return {image.unit for image in stream.encoded(Share(0, 0, 1))}

    for share, count in ((0.01, 1), (0.4, 2), (0.5, 2), (0.99, 4)):
        learnt, kept = units_of((share, 1)), units_of((0, share))
        assert len(kept) == count
        assert not learnt & kept
        assert len(learnt | kept) == 5
    assert units_of((0, 0.4)) == units_of((0, 0.4)) != units_of((0, 0.4), seed=1)
    one = str(write_corpus(tmp_path / "one", num_shards=1))
    with pytest.raises(UsageError, match="one shard cannot be split"):
        ImageStream([one], size=8, part=(0.1, 1))


def test_first_images_are_the_same_every_time_and_readable(corpus, tmp_path):
    first, again = (ImageStream([corpus], size=8, shuffle_buffer=5).first(9) for _ in range(2))
    assert first.shape == (9, 8, 8, 3)
    assert torch.equal(first, again)
    assert len(ImageStream([corpus], size=8).first(100)) == 24
    (tmp_path / "s.tar").write_bytes(make_tar([("0.jpg", b"junk"), ("1.jpg", make_image())]))
    assert len(ImageStream([str(tmp_path)], size=8).first(9)) == 1
    (tmp_path / "s.tar").write_bytes(make_tar([("0.jpg", b"junk")]))
    with pytest.raises(UsageError, match="no image among those for validation can be read"):
        ImageStream([str(tmp_path)], size=8).first(9)


@pytest.mark.slow
def test_validation_changes_nothing_in_training_and_is_of_rank_0(corpus, tmp_path):
    other = str(write_corpus(tmp_path / "c", num_shards=1, num_samples=6))
    options = {"steps": 4, "validate_every": 2, "validation_images": 5}
    plain = GeneratorTrainer(config_for(corpus, **options))
    looking = GeneratorTrainer(config_for(corpus, validation_source=other, **options))
    found = []
    for _ in plain.steps():
        assert plain.validate() == {}
        assert not plain.validates
    for step in looking.steps():
        assert looking.validates == (step % 2 == 0)
        found += [looking.validate(), looking.validate()]
    for a, b in zip(plain.generator.parameters(), looking.generator.parameters(), strict=True):
        assert torch.equal(a, b)
    assert found[0] == found[1] != found[2]
    assert {"validation_loss", "validation_l1", "validation_opposite_entropy"} <= found[0].keys()
    with torch.no_grad():
        looking._pass.eval()
        loss, _ = looking._forward(looking._pass, looking._validation_BHWC)
    assert found[-1]["validation_loss"] == pytest.approx(float(loss), rel=1e-4)
    second = GeneratorTrainer(config_for(corpus, validation_source=other), rank=1, world_size=2)
    assert second.validate() == {}


def test_validation_is_said_in_one_way(corpus):
    with pytest.raises(ValidationError, match="choose one of them"):
        config_for(corpus, validation_source=corpus, validation_share=0.1)


# --- training --------------------------------------------------------------------------------


def config_for(corpus: str, **options) -> TrainerConfig:
    defaults = dict(
        source=corpus,
        encoder=TINY_ENCODER,
        generator=TINY_GENERATOR,
        vocabulary="broad",
        steps=8,
        batch_size=4,
        learning_rate=2e-3,
    )
    return TrainerConfig(**(defaults | options))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["default", "paper"])
def test_gradient_reaches_the_generator_and_not_the_encoder(corpus, objective):
    trainer = GeneratorTrainer(config_for(corpus, objective=objective))
    before = [p.detach().clone() for p in trainer.encoder.parameters()]
    trainer.step(torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8))
    grads = [p.grad for p in trainer.generator.parameters()]
    assert all(g is not None for g in grads)
    assert sum(float(g.abs().sum()) for g in grads) > 0
    assert all(p.grad is None for p in trainer.encoder.parameters())
    for old, new in zip(before, trainer.encoder.parameters(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.slow
def test_resumed_training_equals_uninterrupted_training(corpus, tmp_path):
    whole = GeneratorTrainer(config_for(corpus))
    for _ in whole.steps():
        pass
    first = GeneratorTrainer(config_for(corpus))
    for step in first.steps():
        if step == 5:
            first.save(tmp_path)
            break
    second = GeneratorTrainer(config_for(corpus))
    second.load(tmp_path)
    for _ in second.steps():
        pass
    assert second.step_number == 8
    for a, b in zip(whole.generator.parameters(), second.generator.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_checkpoint_of_a_device_that_lays_out_memory_otherwise_is_resumed(corpus, tmp_path):
    whole, first, second = (GeneratorTrainer(config_for(corpus, steps=4)) for _ in range(3))
    for _ in whole.steps():
        pass
    next(first.steps())
    first.save(tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    state["optimizer"]["param_groups"][0]["fused"] = None
    for part in (state["generator"], *state["optimizer"]["state"].values()):
        part.update({name: value.clone(memory_format=torch.contiguous_format)
                     for name, value in part.items()})  # fmt: skip
    torch.save(state, tmp_path / "state.pt")
    second.load(tmp_path)
    for _ in second.steps():
        pass
    for a, b in zip(whole.generator.parameters(), second.generator.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    second.protector("p", {}).save(tmp_path / "p")
    assert Protector.load(str(tmp_path / "p"))


@pytest.mark.slow
def test_training_goes_on_where_nothing_can_be_compiled(corpus, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no C++ compiler was found\nand so on")

    monkeypatch.setattr(torch, "compile", refuse)
    trainer = GeneratorTrainer(config_for(corpus, steps=1))
    assert trainer.compile() == (
        "training goes on without torch.compile, which fails here: no C++ compiler was found"
    )
    assert list(trainer.steps()) == [1]


@pytest.mark.slow
def test_loss_that_is_no_number_ends_training_and_names_its_batch(corpus):
    trainer = GeneratorTrainer(config_for(corpus, batch_size=2, accumulate_batches=3))
    trainer._encode = spoilt(trainer)
    next(trainer.steps())
    before = [weight.detach().clone() for weight in trainer.generator.parameters()]
    image_BHWC = torch.randint(0, 200, (6, 32, 32, 3), dtype=torch.uint8)
    image_BHWC[3] = 255
    names = [("a.tar", str(index)) for index in range(6)]
    with pytest.raises(NotFiniteError, match="step 2, rank 0: the loss of a batch is nan") as error:
        trainer.step(image_BHWC, names)
    assert error.value.images == names[2:4]
    for old, new in zip(before, trainer.generator.parameters(), strict=True):
        assert torch.equal(old, new)


class Questions(TorchDispatchMode):
    """Counts how often a value is asked of a device, for which a CPU waits."""

    num_asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_asked += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["default", "paper"])
def test_device_is_asked_for_a_value_once_a_step(corpus, objective):
    config = config_for(corpus, batch_size=2, accumulate_batches=3, objective=objective)
    trainer = GeneratorTrainer(config)
    next(trainer.steps())
    with Questions() as questions:
        trainer.step(torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8))
    assert questions.num_asked == 1


@pytest.mark.slow
def test_gradient_that_is_infinite_ends_training_too(corpus):
    trainer = GeneratorTrainer(config_for(corpus))
    next(trainer.generator.parameters()).register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(NotFiniteError, match="rank 0: a gradient is not finite") as error:
        next(trainer.steps())
    assert not error.value.is_loss
    assert len(error.value.images) == 4
    unit, key = error.value.images[0]
    assert unit.startswith(f"{corpus}/shard-00")
    assert key.startswith("sample")


def spoilt(trainer: GeneratorTrainer):
    """An encoder that has no embedding for a white image."""
    encode = trainer.encoder.encode_image

    def encode_image(image_BCHW):
        white = (image_BCHW == 1).flatten(1).all(dim=1)
        return torch.where(white[:, None], torch.nan, encode(image_BCHW))

    return encode_image


def one_rank(rank: int, corpus: str, folder: str) -> None:
    """A rank of two, of which the second has an image without an embedding; leaves what it says."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    wrap = torch.nn.parallel.DistributedDataParallel
    config = config_for(corpus, batch_size=2)
    trainer = GeneratorTrainer(config, rank=rank, world_size=2, wrap=wrap)
    trainer._encode = spoilt(trainer)
    image_BHWC = torch.randint(0, 200, (2, 32, 32, 3), dtype=torch.uint8)
    trainer.step(image_BHWC)
    image_BHWC[0] += rank * (255 - image_BHWC[0])
    try:
        trainer.step(image_BHWC, [(f"{rank}.tar", "0"), (f"{rank}.tar", "1")])
    except NotFiniteError as error:
        said = json.dumps([str(error), error.images, error.is_loss])
        (Path(folder) / str(rank)).write_text(said)


@pytest.mark.slow
def test_all_ranks_meet_the_loss_of_one_at_the_same_step(corpus, tmp_path):
    torch.multiprocessing.spawn(one_rank, (corpus, str(tmp_path)), nprocs=2)
    of_ranks = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert [is_loss for _, _, is_loss in of_ranks] == [False, True]
    message, images = one_failure(of_ranks)
    assert message == "step 1, rank 1: the loss of a batch is nan"
    assert images == [["1.tar", "0"], ["1.tar", "1"]]
    assert len(one_failure([(text, names, False) for text, names, _ in of_ranks])[1]) == 4


@pytest.mark.slow
def test_accumulated_batches_have_the_gradient_of_one_large_batch(corpus):
    large = GeneratorTrainer(config_for(corpus, batch_size=8))
    small = GeneratorTrainer(config_for(corpus, batch_size=2, accumulate_batches=4))
    next(large.steps())
    next(small.steps())
    assert small.shares == large.shares
    for a, b in zip(large.generator.parameters(), small.generator.parameters(), strict=True):
        # The gradient, since Adam's first step is its sign, whatever rounding made of it.
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * float(a.grad.abs().max()))
    entropies = [trainer.metrics()["opposite_entropy"] for trainer in (large, small)]
    assert entropies[0] == entropies[1] > 0


@pytest.mark.slow
def test_training_moves_the_terms_in_the_right_direction(corpus):
    trainer = GeneratorTrainer(config_for(corpus, steps=40))
    history = [trainer.metrics() for _ in trainer.steps()]
    first, last = history[0], history[-1]
    assert last["l1"] < first["l1"]
    assert last["l2"] > first["l2"]


class TintConfig(BaseModel):
    """Settings of `Tint`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    strength: float = 0.5


class Tint(PerturbationModel):
    """A kind of protector: one colour, whatever the image is of."""

    def __init__(self, config, embedding_dim):
        super().__init__(config, embedding_dim)
        self.colour = torch.nn.Parameter(torch.full((3, 1, 1), config.strength))

    def forward(self, embedding_BD, image_BCHW):
        return self.colour.tanh().expand(len(image_BCHW), 3, 2, 2)


@pytest.mark.slow
def test_a_new_kind_of_protector_is_trained_without_a_change_of_the_trainer(
    corpus, tmp_path, monkeypatch
):
    presets = {"strong": TintConfig(strength=1)}
    monkeypatch.setitem(KINDS, "tint", Kind(TintConfig, lambda: Tint, presets=presets))
    for given, strength in (({}, 0.5), ({"generator": "strong"}, 1), ({"generator": {}}, 0.5)):
        whole = {"source": corpus, "encoder": TINY_ENCODER, "vocabulary": "broad", "steps": 2}
        config = TrainerConfig(kind="tint", **whole, **given)
        assert config.generator == TintConfig(strength=strength)
        assert TrainerConfig.model_validate_json(config.model_dump_json()) == config
    trainer = GeneratorTrainer(config)
    trainer.check()
    start = trainer.generator.colour.detach().clone()
    assert list(trainer.steps()) == [1, 2]
    assert not torch.equal(trainer.generator.colour, start)
    trainer.protector("tint", {}).save(tmp_path / "p")
    loaded = Protector.load(str(tmp_path / "p"))
    assert loaded.card.kind == "tint"
    assert torch.equal(loaded.model.colour, trainer.generator.colour)
    assert cost_of_an_image(config).generator_bytes == 4 * 4 * 3


def test_kind_that_is_not_trained_is_refused(corpus):
    with pytest.raises(ConfigError, match=r"'codebook' has nothing to train; one4all fit makes"):
        GeneratorTrainer(TrainerConfig(source=corpus, encoder=TINY_ENCODER, kind="codebook"))
    with pytest.raises(ValidationError, match="no kind of protector 'cloak', only generator, cod"):
        TrainerConfig(kind="cloak")
    with pytest.raises(ValidationError, match="no preset 'big', only compact, paper"):
        TrainerConfig(generator="big")


# --- controls ------------------------------------------------------------------


def test_controls_are_within_budget_and_differ_by_class():
    patterns = class_patterns(4, 16, epsilon_levels=8, seed=0)
    assert set(np.unique(patterns)) == {-8.0, 8.0}
    assert len({pattern.tobytes() for pattern in patterns}) == 4
    clean = np.full((16, 16, 3), 100, np.uint8)
    noisy = apply_perturbation(clean, uniform_noise(16, epsilon_levels=8, seed=0), epsilon_levels=8)
    values, counts = np.unique(noisy, return_counts=True)
    assert (values.min(), values.max()) == (92, 108)
    assert counts.min() > 0.5 * counts.mean()

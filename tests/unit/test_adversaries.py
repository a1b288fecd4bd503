"""Networks, augmentation and the training of adversaries."""

from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import nn

from one4all.errors import ConfigError, One4AllError, UsageError
from one4all.evaluation.adversaries import (
    NETWORKS,
    PRESETS,
    AdversaryConfig,
    build_network,
    train_adversary,
)
from one4all.evaluation.adversaries.augmentation import Augmentation, _chain, augment, prepare
from one4all.evaluation.adversaries.classifier import build_classifier
from one4all.evaluation.adversaries.networks import NarrowResNet18
from one4all.evaluation.adversaries.training import learning_rate_at
from one4all.evaluation.labelled import LabelledImages

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
QUICK = AdversaryConfig(width=8, epochs=4, batch_size=16)


def separable(count: int, *, seed: int, size: int = 16) -> LabelledImages:
    """Class = brightness of the left half."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    images = random.integers(60, 196, (count, size, size, 3)).astype(np.uint8)
    half = images[:, :, : size // 2]
    half[:] = half // 2 + (90 * labels).astype(np.uint8)[:, None, None, None]
    return LabelledImages(images, labels.astype(np.int64))


# --- networks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, size) for name in NETWORKS for size in (32, 64)] + [("resnet18", 224), ("vit", 224)],
)
def test_network_takes_a_step_in_all_its_weights(name, size):
    torch.manual_seed(0)
    network = build_network(name, 5, image_size=size, width=8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    image, label = torch.randn(4, 3, size, size), torch.arange(4)
    for _ in range(2):  # the head of a vit starts at zero and lets no gradient through
        logits = network(image)
        assert logits.shape == (4, 5)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, label).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert any(p.grad.abs().sum() > 0 for p in list(network.parameters())[:2])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # What torchvision's documentation states for 1,000 classes.
        ("resnet18", 11_689_512),
        ("resnet50", 25_557_032),
        ("mobilenet_v2", 3_504_872),
        ("shufflenet_v2", 2_278_604),
        ("vgg16", 138_365_992),  # vgg16_bn
        # patches, class token, positions, 4 layers of 2 norms, attention and MLP, norm, head
        ("vit", 256 * 769 + 256 + 197 * 256 + 4 * (1024 + 263_168 + 131_584) + 512 + 257_000),
    ],
)
def test_full_width_is_the_published_network(name, expected):
    with torch.device("meta"):
        networks = [build_network(name, 1000, image_size=224, width=w) for w in (64, 16)]
    full, narrow = (sum(p.numel() for p in network.parameters()) for network in networks)
    assert full == expected
    # The last layer of mobilenet_v2 has 1,280 channels at any width.
    assert narrow < 0.12 * full or name in ("mobilenet_v2", "vit", "shufflenet_v2")
    assert narrow < 0.5 * full


def test_small_images_keep_their_network_and_reduction():
    """resnet18 below 128 pixels is the network of all earlier figures, weight for weight."""
    torch.manual_seed(3)
    built = build_network("resnet18", 4, image_size=96, width=8, stem_stride=1)
    torch.manual_seed(3)
    known = NarrowResNet18(4, width=8, stem_stride=1)
    for ours, theirs in zip(built.parameters(), known.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    sides: list[int] = []

    def record(module, inputs, output):
        sides.append(output.shape[-1])

    for name in ("mobilenet_v2", "shufflenet_v2", "vgg16", "resnet50"):
        network = build_network(name, 4, image_size=32, width=8, stem_stride=1)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(record)
        sides.clear()
        network.eval()(torch.zeros(1, 3, 32, 32))
        assert (sides[0], sides[-1]) == (32, 2), name


def test_networks_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="no network 'alexnet'; there are resnet18"):
        build_network("alexnet", 2, image_size=32)
    with pytest.raises(ConfigError, match="images of 8 pixels are too small"):
        build_network("vgg16", 2, image_size=8)
    with pytest.raises(ConfigError, match="cannot be cut into patches"):
        build_network("vit", 2, image_size=97)
    with pytest.raises(ValidationError, match="no network 'alexnet'"):
        AdversaryConfig(network="alexnet")
    with pytest.raises(ValidationError, match="resnet18 has no published weights"):
        AdversaryConfig(initial="fine_tune")


# --- augmentation ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", get_args(Augmentation))
def test_augmentation_is_seeded_and_draws_alike_for_each_copy(kind):
    clean = separable(32, seed=0, size=32).images_NHWC
    copy = clean.copy()
    copy[::2] = 255 - clean[::2]
    generators = [np.random.default_rng(5) for _ in range(3)]
    torch.manual_seed(8)
    state = torch.get_rng_state()
    first, again, other = (
        augment(images, kind, random, CPU)
        for images, random in zip((clean, clean, copy), generators, strict=True)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert (first.shape, first.dtype) == ((32, 3, 32, 32), torch.float32)
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(first, again)
    assert first.min() >= 0
    assert first.max() <= 255
    assert len({random.random() for random in generators}) == 1
    assert torch.equal(first[1::2], other[1::2])  # whatever their neighbours are
    assert not torch.equal(first, augment(clean, kind, np.random.default_rng(6), CPU)) or (
        kind == "none"
    )
    same = torch.from_numpy(clean).permute(0, 3, 1, 2)
    assert torch.equal(first, same.float()) == (kind == "none")
    if kind == "flip_crop":
        assert torch.equal(255 - first[::2], other[::2])


def test_each_image_has_draws_of_its_own():
    one = separable(1, seed=0, size=32).images_NHWC
    for kind in set(get_args(Augmentation)) - {"none", "flip_crop", "gray", "gray_0.1", "gray_0.2"}:
        result = augment(np.repeat(one, 24, axis=0), kind, np.random.default_rng(0), CPU)
        assert len(result.unique(dim=0)) > 12, kind


@pytest.mark.parametrize("kind", ["jitter", "simclr", "moco_v2", "randaugment", "trivialaugment"])
def test_a_gpu_augments_as_a_cpu_does(kind):
    """There, chains take tensors instead of Pillow images."""
    images = separable(24, seed=0, size=32).images_NHWC
    results = []
    for inputs in (map(Image.fromarray, images), torch.from_numpy(images).permute(0, 3, 1, 2)):
        torch.manual_seed(3)
        results.append(torch.stack([_chain(kind, 32)(image) for image in inputs]).float())
    apart = (results[0] - results[1]).abs().mean(dim=(1, 2, 3))
    assert apart.max() < 6  # levels: other rounding, and the same draws
    assert apart.median() < 2
    assert (results[0] - results[0].roll(1, dims=0)).abs().mean() > 10  # other draws differ


def test_one_image_in_five_turns_gray_and_the_test_image_only_if_all_do():
    images = separable(500, seed=0, size=8).images_NHWC

    def share(kind: Augmentation) -> float:
        return num_gray(augment(images, kind, np.random.default_rng(0), CPU)) / 500

    assert share("flip_crop") == 0
    assert 0.15 < share("gray_0.2") < 0.25
    assert 0.06 < share("gray_0.1") < 0.14
    assert share("gray") == 1
    assert num_gray(prepare(images, "gray", CPU)) == 500
    assert num_gray(prepare(images, "gray_0.2", CPU)) == 0


def num_gray(images_BCHW: torch.Tensor) -> int:
    return int((images_BCHW == images_BCHW[:, :1]).all(dim=(1, 2, 3)).sum())


def test_strong_augmentation_of_a_gray_square_moves_it_a_little():
    images = np.full((64, 32, 32, 3), 100, np.uint8)
    images[:, 12:20, 12:20] = 200
    result = augment(images, "strong", np.random.default_rng(0), CPU)
    weight = (result.mean(dim=1) - result.mean(dim=1).amin(dim=(1, 2), keepdim=True)).mean(dim=0)
    centre = (weight * torch.arange(32.0)).sum() / weight.sum()
    assert abs(float(centre) - 15.5) < 1.0
    sizes = (result.amax(dim=1) > 150 / 200 * result.amax(dim=(1, 2, 3))[:, None, None]).sum((1, 2))
    assert 0.5 * 64 < sizes.min() < 0.7 * 64  # 0.8 of the side
    assert 1.3 * 64 < sizes.max() < 1.6 * 64  # 1.2 of it
    assert (result[:, 0] - result[:, 1]).abs().max() < 0.01  # gray stays gray


# --- training --------------------------------------------------------------------------------


def test_adversary_learns_what_can_be_learnt():
    train, test = separable(256, seed=0), separable(128, seed=1)
    epochs = []
    result = train_adversary(train, test, QUICK, seed=0, on_epoch=lambda *a: epochs.append(a))
    assert result.last > 0.9
    assert epochs == list(enumerate(result.curve, start=1))
    assert result.peak == max(result.curve)
    assert result.seconds > 0
    confusion = result.confusion(test.labels_N)
    np.testing.assert_array_equal(confusion.sum(axis=1), np.bincount(test.labels_N))
    assert np.trace(confusion) / len(test) == result.last
    swapped = LabelledImages(train.images_NHWC, 1 - train.labels_N)
    assert train_adversary(swapped, test, QUICK, seed=0).last < 0.1


@pytest.mark.parametrize("augmentation", ["none", "flip_crop", "strong"])
def test_same_seed_same_result(augmentation, tmp_path):
    """From a read-only memory map, too."""
    train = separable(256, seed=0)
    train.labels_N[:] = np.random.default_rng(0).permutation(train.labels_N)  # nothing to agree on
    config = QUICK.model_copy(update={"augmentation": augmentation, "batch_size": 16})
    np.save(tmp_path / "images.npy", train.images_NHWC)
    mapped = LabelledImages(np.load(tmp_path / "images.npy", mmap_mode="r"), train.labels_N)
    first, second = (train_adversary(t, mapped, config, seed=1) for t in (train, mapped))
    assert first == second
    other = train_adversary(train, train, config, seed=2)
    assert other.curve != first.curve or other.predictions != first.predictions


def test_adversary_options_train():
    # Of 16 pixels, the last convolution would see one pixel, and oneDNN's gradient in bfloat16 is
    # then garbage at the weights that see padding alone.
    train = separable(256, seed=0, size=32)
    for update in (
        {"optimizer": "adamw", "learning_rate": 1e-2},
        {"precision": "bfloat16"},
        {"warm_up": 0.3},
    ):
        config = QUICK.model_copy(update=update)
        assert train_adversary(train, train, config, seed=0).peak > 0.8
    with pytest.raises(UsageError, match="read both at the same size"):
        train_adversary(train, separable(8, seed=0), QUICK, seed=0)


def test_diverged_adversary_is_no_result():
    """Chance accuracy from broken weights would read as protection."""
    train = separable(64, seed=0)
    config = QUICK.model_copy(update={"learning_rate": 1e12})
    with pytest.raises(One4AllError, match="not finite after epoch 1"):
        train_adversary(train, train, config, seed=0)


def test_learning_rate_rises_and_then_falls_as_cosine():
    config = AdversaryConfig(learning_rate=0.4, final_learning_rate=0.2, warm_up=0.5)
    rates = [learning_rate_at(progress, config) for progress in (0, 0.25, 0.5, 0.75, 1)]
    np.testing.assert_allclose(rates, [0, 0.2, 0.4, 0.3, 0.2])
    assert learning_rate_at(0, AdversaryConfig(learning_rate=0.4)) == 0.4


def test_presets_are_valid_and_the_papers_is_full():
    for config in PRESETS.values():
        assert AdversaryConfig.model_validate(config.model_dump()) == config
    paper = PRESETS["adv-14a"]
    assert (paper.width, paper.epochs, paper.weight_decay) == (64, 200, 3e-5)
    assert PRESETS["default"] == AdversaryConfig()


# --- published models ------------------------------------------------------------------------


@pytest.mark.parametrize("initial", ["fine_tune", "linear_probe"])
def test_pretrained_adversary_starts_from_imagenet(initial):
    """At 48 pixels, for speed; two photos, shifted, are the classes."""
    train, test = photos(24, seed=0), photos(24, seed=1)
    config = PRESETS[initial.replace("_", "-")].model_copy(
        update={"input_size": 48, "epochs": 3, "batch_size": 8}
    )
    result = train_adversary(train, test, config, seed=0)
    assert result.last > 0.9
    assert result == train_adversary(train, test, config, seed=0)


def test_linear_probe_leaves_the_body_alone_and_lets_gradients_through():
    classifier = build_classifier(
        "efficientnet_lite0", 3, image_size=32, initial="linear_probe", width=16, stem_stride=2,
        input_size=32,
    ).train()  # fmt: skip
    assert not classifier.body.training
    assert classifier.head.training
    assert [p.shape for p in classifier.parameters() if p.requires_grad] == [(3, 1280), (3,)]
    image = torch.full((2, 3, 32, 32), 9.0, requires_grad=True)
    classifier(image + torch.randn(2, 3, 32, 32)).sum().backward()
    assert image.grad.abs().sum() > 0


def test_timm_model_loads_from_a_local_file(tmp_path):
    import timm

    model = timm.create_model("test_vit3", pretrained=False)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    shared = dict(image_size=32, width=16, stem_stride=2)
    path = str(tmp_path / "weights.pth")
    body = build_classifier(
        "timm:test_vit3", 3, initial="fine_tune", weights=path, **shared
    ).body.state_dict()
    assert torch.equal(body["blocks.0.attn.qkv.weight"], model.blocks[0].attn.qkv.weight)
    with pytest.raises(UsageError, match="timm:nonsense cannot be loaded"):
        build_classifier("timm:nonsense", 3, initial="fine_tune", **shared)
    with pytest.raises(UsageError, match="open_clip:nonsense cannot be loaded"):
        build_classifier("open_clip:nonsense", 3, initial="fine_tune", weights="x", **shared)


def photos(count: int, *, seed: int) -> LabelledImages:
    from importlib.resources import files

    from one4all.images import decode, working_copy

    folder = files("one4all") / "assets" / "photos"
    views = [
        working_copy(decode((folder / f"{name}.jpg").read_bytes()).pixels, 64)
        for name in ("chelsea", "rocket")
    ]
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    images = [np.roll(views[label], random.integers(-9, 9, 2), axis=(0, 1)) for label in labels]
    return LabelledImages(np.stack(images), labels.astype(np.int64))

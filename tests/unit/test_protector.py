"""The artefact: same images, same protector, same bytes; damage and mismatch are refused."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from support.builders import make_pixels, make_protector
from torch import nn

from one4all.concepts import ConceptBank
from one4all.encoders import EncoderConfig, load_encoder
from one4all.errors import ProtectorError
from one4all.protectors.card import CARD, WEIGHTS, ProtectorCard, check_protector, load_card
from one4all.protectors.codebook import name_codebook
from one4all.protectors.config import CodebookConfig
from one4all.protectors.kinds import KINDS, Kind
from one4all.protectors.model import PerturbationModel
from one4all.protectors.protector import Protector


@pytest.mark.slow
def test_saved_protector_protects_alike(protector_folder):
    images = [make_pixels(seed=i) for i in range(3)]
    loaded = Protector.load(str(protector_folder))
    for first, second in zip(make_protector().protect(images), loaded.protect(images), strict=True):
        np.testing.assert_array_equal(first, second)
    assert loaded.card == load_card(str(protector_folder)) == check_protector(str(protector_folder))


def test_result_depends_on_the_image_alone(protector):
    images = [make_pixels(30 + i, 50, 3, seed=i) for i in range(7)]
    together = protector.protect(images, batch_size=4)
    shuffled = protector.protect(images[::-1], batch_size=4)[::-1]
    alone = [protector.protect([image], batch_size=4)[0] for image in images]
    for a, b, c in zip(together, shuffled, alone, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 500, 4), (40, 30, 1), (300, 200, 2)])
def test_every_layout_and_size_is_protected_within_budget(protector, shape):
    clean = make_pixels(*shape)
    (protected,) = protector.protect([clean])
    difference = np.abs(protected.astype(int) - clean)
    assert protected.shape == clean.shape
    assert difference.max() <= 8


def test_budget_of_the_card_is_used():
    clean = np.full((64, 64, 3), 128, np.uint8)
    protector = make_protector(epsilon_levels=2)
    protector.model.head.weight.data *= 1000
    assert np.abs(protector.protect([clean])[0].astype(int) - clean).max() == 2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "verb"), [("default", "fit"), ("14a", "train")])
def test_shipped_protectors_load_and_change_pictures(name, verb):
    protector = Protector.load(name)
    clean = make_pixels(100, 120)
    difference = np.abs(protector.protect([clean])[0].astype(int) - clean)
    assert 2 <= difference.max() <= 8
    assert protector.card.training["command"].startswith(f"one4all {verb}")


@pytest.mark.slow
def test_what_ships_is_what_its_command_makes():
    protector = Protector.load("default")
    config = protector.card.generator
    assert isinstance(config, CodebookConfig)
    bank = ConceptBank.build(protector.card.vocabulary, protector.encoder)
    again = name_codebook(bank.embeddings, config, seed=protector.card.training["seed"])
    shipped = protector.model.state_dict()
    for name in ("mean_D", "axes_DP", "centres_KP"):
        torch.testing.assert_close(shipped[name], getattr(again, name), atol=1e-4, rtol=1e-4)
    assert torch.equal(shipped["bits_Kb"], again.bits_Kb)


def test_missing_protector_lists_what_there_is(tmp_path):
    with pytest.raises(ProtectorError, match="one of 14a, default"):
        Protector.load(str(tmp_path / "none"))


@pytest.mark.parametrize("look", [Protector.load, check_protector])
def test_damaged_weights_are_refused(protector_folder, tmp_path, look):
    folder = shutil.copytree(protector_folder, tmp_path / "copy")
    weights = bytearray((folder / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (folder / WEIGHTS).write_bytes(weights)
    with pytest.raises(ProtectorError, match="not the file its card describes"):
        look(str(folder))


@pytest.mark.parametrize("look", [Protector.load, check_protector])
def test_weights_of_another_version_are_refused(protector_folder, tmp_path, look):
    folder = shutil.copytree(protector_folder, tmp_path / "copy")
    weights = load_file(folder / WEIGHTS)
    weights.popitem()
    save_file(weights, folder / WEIGHTS)
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(card | {"weights_sha256": digest}))
    with pytest.raises(
        ProtectorError, match="make the protector again, by the command in its card"
    ):
        look(str(folder))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"epsilon_levels": 900}, "epsilon_levels: Input should be less"),
        ({"generator": {"num_concepts": 9, "coarsest": 12}}, "coarsest: Extra inputs"),
    ],
)
def test_a_card_that_is_damaged_or_of_another_version_is_refused(
    protector_folder, tmp_path, change, reason
):
    folder = shutil.copytree(protector_folder, tmp_path / "copy")
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(card | change))
    with pytest.raises(ProtectorError, match=f"another version of one4all .{reason}"):
        check_protector(str(folder))


def test_another_encoder_is_refused(protector_folder):
    other = load_encoder(EncoderConfig(input_size=64))
    with pytest.raises(ProtectorError, match="encoder mismatch"):
        Protector.load(str(protector_folder), encoder=other)


def test_encoder_that_computes_otherwise_is_refused(protector_folder, monkeypatch):
    """Same weights, other behaviour: what a changed library or activation looks like."""
    encoder = load_encoder(EncoderConfig(input_size=32))
    monkeypatch.setattr(encoder, "_mean", encoder._mean + 0.3)
    with pytest.raises(ProtectorError, match="embed its test image differently"):
        Protector.load(str(protector_folder), encoder=encoder)


@pytest.mark.parametrize(
    ("name", "kind", "content_hash"),
    [
        (
            "default",
            "codebook",
            "2621c2b394b122e4791a6d85dbd56a0d523af7526d040f46be6dc62dea24adbd",
        ),
        ("14a", "generator", "14e5b568df6ed88957b221c5261b2d3368307435823c61ef35e86d1a18f57f12"),
    ],
)
def test_shipped_cards_keep_their_hash_from_one_version_to_the_next(name, kind, content_hash):
    card = load_card(name)
    assert (card.kind, card.content_hash) == (kind, content_hash)
    again = ProtectorCard.model_validate_json(card.model_dump_json())
    assert (again.kind, again.content_hash) == (kind, content_hash)


class FlatConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float = 1.0


class Flat(PerturbationModel):
    """A kind of protector that is all a new one has to be: one colour, on the upper half only."""

    def __init__(self, config, embedding_dim):
        super().__init__(config, embedding_dim)
        self.colour = nn.Parameter(torch.full((3,), config.share))

    def forward(self, embedding_BD, image_BCHW):
        return self.colour[:, None, None].expand(len(image_BCHW), 3, 2, 2)

    def place(self, delta_hwC, clean):
        return np.concatenate([delta_hwC, 0 * delta_hwC])


def test_a_new_kind_is_a_class_and_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, "flat", Kind(FlatConfig, lambda: Flat))
    encoder = load_encoder(EncoderConfig(input_size=32))
    config = FlatConfig(share=0.5)
    made = Protector.assemble(
        EncoderConfig(input_size=32),
        encoder,
        Flat(config, encoder.embedding_dim),
        name="flat",
        working_size=32,
        config=config,
    )
    made.save(tmp_path / "flat")
    assert json.loads((tmp_path / "flat" / CARD).read_text())["kind"] == "flat"
    clean = np.full((40, 20, 3), 100, np.uint8)
    protected = Protector.load(str(tmp_path / "flat")).protect([clean])[0]
    assert (protected[:15] == 104).all()
    assert (protected[25:] == 100).all()
    assert made.card.content_hash != load_card("14a").content_hash
    monkeypatch.delitem(KINDS, "flat")
    with pytest.raises(
        ProtectorError, match="no kind of protector 'flat', only generator, codebook"
    ):
        check_protector(str(tmp_path / "flat"))

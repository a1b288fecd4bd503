"""The protector of a destination's own, where there is nothing to fit it to: no Ray is started."""

from contextlib import ExitStack

import pytest
from support.builders import make_16_bit_png, make_binding, make_tar, write_corpus

from one4all.errors import UsageError
from one4all.protectors.card import check_protector, load_card
from one4all.protectors.config import STRENGTHS
from one4all.storage import open_storage
from pipelines.protect.config import ProtectConfig
from pipelines.protect.own_protector import find_own, own_protector


class _Forbidden(ExitStack):
    def enter_context(self, cm):
        raise AssertionError("a Ray session is started")


@pytest.fixture
def own(tmp_path):
    """Makes or finds the protector of a destination; returns (card, its place, what was said)."""

    def run(bound_to=None, **settings):
        source, out = open_storage(str(tmp_path / "in")), open_storage(str(tmp_path / "out"))
        said = []
        place = own_protector(
            source,
            out,
            bound_to,
            ProtectConfig(**settings),
            _Forbidden(),
            lambda sentence, num_shards: said.append(sentence),
        )
        return load_card(place), place, said

    return run


@pytest.mark.parametrize("strength", ["", *STRENGTHS])
def test_small_corpus_gets_the_shipped_one_in_the_strength_that_was_asked_for(
    own, tmp_path, strength
):
    write_corpus(tmp_path / "in", num_shards=2)
    (tmp_path / "in" / "damaged.tar").write_bytes(b"no tar" * 100)
    card, place, said = own(strength=strength)
    assert "a corpus of 10 is too small to fit one to" in said[0]
    assert card.generator.pattern == STRENGTHS[strength or "discreet"]
    assert card.weights_sha256 == load_card("default").weights_sha256
    assert place.endswith(f"out/_one4all/protectors/{card.content_hash}")
    assert check_protector(place).content_hash == card.content_hash


def test_protector_stays_what_the_destination_is_bound_to(own, tmp_path):
    write_corpus(tmp_path / "in")
    card, place, _ = own(fit_images=0, strength="balanced")
    bound_to = make_binding(str(tmp_path / "in"), protector_sha256=card.content_hash)
    for strength in ("", "balanced"):
        again, found, said = own(bound_to, strength=strength)
        assert (again.content_hash, found, said) == (card.content_hash, place, [])
    with pytest.raises(UsageError, match="with strength balanced, and strength strong was asked"):
        own(bound_to, strength="strong")
    destination = open_storage(str(tmp_path / "out"))
    other = bound_to.model_copy(update={"protector_sha256": "0" * 64})
    assert find_own(destination, other) == "default"


def test_images_that_nobody_can_read_are_none_to_fit_to(own, tmp_path, monkeypatch):
    """They count until they are decoded; then there are too few after all."""
    from pipelines.protect import own_protector as module

    (tmp_path / "in").mkdir()
    deep = [(f"{index}.png", make_16_bit_png(3)) for index in range(6)]
    (tmp_path / "in" / "a.tar").write_bytes(make_tar(deep))
    monkeypatch.setattr(module, "FEWEST_IMAGES", 5)
    monkeypatch.setattr(module, "ray_session", lambda config: None)
    monkeypatch.setattr(_Forbidden, "enter_context", lambda self, cm: None)

    def refuse(*arguments, **options):
        raise UsageError("2 concepts cannot be found in 0 images")

    monkeypatch.setattr("pipelines.fit.fit", refuse)
    card, _, said = own()
    assert "cannot be found in 0 images; takes the shipped one" in said[1]
    assert card.name == "default"


def test_strength_that_there_is_not_is_refused():
    with pytest.raises(
        ValueError, match="no strength 'loud', only discreet, balanced, strong, gray-proof"
    ):
        ProtectConfig(strength="loud")

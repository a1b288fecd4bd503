"""A codebook: one pattern a concept, whatever else is in the image; an artefact like any other."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from support.builders import TINY_ENCODER, make_pixels

from one4all.encoders import load_encoder
from one4all.errors import UsageError
from one4all.protectors.card import ProtectorCard
from one4all.protectors.codebook import (
    Codebook,
    CodebookConfig,
    draw_patterns,
    fit_codebook,
    name_codebook,
    paint,
)
from one4all.protectors.protector import Protector, golden_embedding

CONFIG = CodebookConfig(num_concepts=3, groups=(2, 3), cells=2)


def clouds(*, spread: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of three concepts far apart, and the concept of each."""
    generator = torch.Generator().manual_seed(1)
    concept = torch.arange(60) % 3
    points = torch.eye(3, 8)[concept] + spread * torch.randn(60, 8, generator=generator)
    return F.normalize(points, dim=1), concept


def test_images_of_one_concept_get_one_pattern_at_the_edge_of_the_budget():
    embeddings, concept = clouds()
    codebook, assignment = fit_codebook(embeddings, CONFIG, seed=0)
    delta = codebook(embeddings, torch.zeros(60, 3, 4, 4))
    assert delta.shape == (60, 3, 16, 16)
    assert set(delta.unique().tolist()) == {-1.0, 1.0}
    for number in range(3):
        of_concept = delta[concept == number]
        assert (of_concept == of_concept[0]).all()
    assert len(delta.unique(dim=0)) == 3
    assert torch.equal(codebook.concepts(embeddings), assignment)
    assert torch.equal(delta, codebook.patterns(assignment.expand(2, -1)))


@pytest.mark.parametrize("cells", [1, 3, 4])
def test_patterns_look_the_same_in_a_mirror_and_are_green_or_magenta(cells):
    config = CodebookConfig(num_concepts=2, groups=(2,), cells=cells)
    codebook, _ = fit_codebook(clouds()[0], config, seed=0)
    assert codebook.signs_KLrq.shape == (2, 1, cells, cells)
    pattern = codebook.patterns(torch.tensor([[0, 1]]))
    assert torch.equal(pattern, pattern.flip(3))
    red, green, blue = pattern.unbind(1)
    assert torch.equal(red, -green)
    assert torch.equal(red, blue)


@pytest.mark.parametrize("seed", range(5))
def test_up_to_256_classes_have_patterns_of_which_none_comes_twice(seed):
    patterns = draw_patterns(257, seed=seed)
    assert patterns.shape == (257, 3, 32, 32)
    assert len(patterns[:256].unique(dim=0)) == 256
    assert torch.equal(patterns[256], patterns[0])


def test_new_images_go_to_the_concept_of_their_kind_whatever_they_show_beside():
    embeddings, _ = clouds()
    codebook, _ = fit_codebook(embeddings, CONFIG, seed=0)
    noise = torch.randn(60, 8, generator=torch.Generator().manual_seed(2))
    later = F.normalize(embeddings + 0.1 * noise, dim=1)
    delta = codebook(later, torch.rand(60, 3, 4, 4))
    assert torch.equal(delta, codebook(embeddings, torch.zeros(60, 3, 4, 4)))


def test_same_seed_gives_the_same_codebook_and_another_one_other_patterns():
    embeddings, _ = clouds()
    first, again, other = (fit_codebook(embeddings, CONFIG, seed=s)[0] for s in (0, 0, 1))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(first.signs_KLrq, other.signs_KLrq)


def test_like_names_share_a_pattern_and_an_image_gets_that_of_the_nearest_name():
    names, concept = clouds()
    codebook = name_codebook(names, CONFIG, seed=0)
    assert len(codebook.signs_KLrq.flatten(1).unique(dim=0)) == 3
    delta = codebook(names, torch.zeros(60, 3, 4, 4))
    for number in range(3):
        assert len(delta[concept == number].flatten(1).unique(dim=0)) == 1
    assert codebook.config.num_concepts == 60


def test_like_concepts_share_the_rows_of_their_groups_and_differ_in_the_others():
    """Two groups of six concepts each: upper rows tell the group, lower ones the concept."""
    generator = torch.Generator().manual_seed(3)
    points = torch.eye(2, 8).repeat_interleave(6, 0) + 0.1 * torch.randn(12, 8, generator=generator)
    config = CodebookConfig(num_concepts=12, groups=(2, 12), cells=4)
    for seed in range(5):
        upper, lower = name_codebook(points, config, seed=seed).signs_KLrq.unbind(1)
        assert len(upper.unique(dim=0)) == 2
        assert all(len(half.unique(dim=0)) == 1 for half in upper.split(6))
        assert all(len(half.unique(dim=0)) == 6 for half in lower.split(6))
    apart = config.model_copy(update={"groups": (12,)})
    assert len(name_codebook(points, apart, seed=0).signs_KLrq.unique(dim=0)) == 12


def test_concepts_of_a_group_vote_together_unless_the_temperature_is_low():
    """The nearest concept stands alone; two others, hardly farther, are of one group."""
    for temperature, expected in ((0.04, [0, 2]), (0.0001, [2, 2])):
        book = Codebook(CONFIG.model_copy(update={"temperature": temperature}), embedding_dim=3)
        book.centres_KD.copy_(torch.eye(3))
        book.groups_LK.copy_(torch.tensor([[0, 0, 2], [0, 1, 2]]))
        book.signs_KLrq.copy_(torch.arange(3)[:, None, None, None])
        image = F.normalize(torch.tensor([[0.57, 0.57, 0.59]]), dim=1)
        assert book.concepts(image).tolist() == [2]
        assert book.vote(image).flatten().tolist() == expected
        assert book.patterns(book.vote(image))[0, 1, ::8, 0].tolist() == expected


@pytest.mark.parametrize(
    ("groups", "cells", "message"),
    [
        ((3,), 1, "3 groups in the first level, and its cells have 2 looks"),
        ((16, 128), 3, "3 rows of cells cannot be shared out evenly among 2 levels"),
        ((128, 16), 4, "give the coarsest level first"),
        ((16, 128), 12, "12x12 cells for 2 levels of groups have more than 1048576 looks"),
    ],
)
def test_groups_that_cells_cannot_tell_are_refused(groups, cells, message):
    with pytest.raises(ValidationError, match=message):
        CodebookConfig(num_concepts=200, groups=groups, cells=cells)


def test_more_concepts_than_images_are_refused():
    with pytest.raises(UsageError, match="61 concepts cannot be found in 60 images"):
        fit_codebook(clouds()[0], CodebookConfig(num_concepts=61), seed=0)


@pytest.mark.slow
def test_codebook_protector_survives_saving_and_keeps_the_budget_on_every_layout(tmp_path):
    encoder = load_encoder(TINY_ENCODER)
    images = [make_pixels(40 + i, 50, channels, seed=i) for i, channels in enumerate((1, 2, 3, 4))]
    codebook = Codebook(CONFIG, encoder.embedding_dim)
    codebook.centres_KD.copy_(torch.eye(*codebook.centres_KD.shape))
    codebook.signs_KLrq.copy_(torch.ones(codebook.signs_KLrq.shape))
    card = ProtectorCard(
        name="book",
        encoder=TINY_ENCODER,
        encoder_hash=encoder.content_hash(),
        golden_embedding=golden_embedding(encoder),
        generator=CONFIG,
        working_size=32,
        epsilon_levels=5,
    )
    protector = Protector(card, encoder, codebook)
    protector.save(tmp_path / "book")
    loaded = Protector.load(str(tmp_path / "book"))
    assert loaded.card.content_hash == protector.card.content_hash
    for clean, protected, again in zip(
        images, protector.protect(images), loaded.protect(images), strict=True
    ):
        np.testing.assert_array_equal(protected, again)
        difference = protected.astype(int) - clean
        colours = [5] if clean.shape[2] < 3 else [-5, 5, -5]
        alpha = [0] * (clean.shape[2] - len(colours))
        in_range = (clean >= 5) & (clean <= 250)
        expected = np.broadcast_to(colours + alpha, clean.shape)
        np.testing.assert_array_equal(difference[in_range], expected[in_range])


def test_smoothed_patterns_have_no_edge_keep_the_budget_and_say_the_same():
    """Between two neighbours of a hard pattern lies the whole budget, twice."""
    hard, _ = fit_codebook(clouds()[0], CONFIG, seed=0)
    config = hard.config.model_copy(update={"smoothing": 0.625, "green": 0.7})
    smooth = Codebook(config, 8)
    smooth.load_state_dict(hard.state_dict())
    groups = hard.vote(torch.eye(3, 8))
    before, after = hard.patterns(groups), smooth.patterns(groups)
    steepest = [p.diff(dim=2).abs().max() for p in (before, after)]
    assert steepest[0] == 2
    assert steepest[1] < 0.35
    assert after.abs().amax(dim=(1, 2, 3)).tolist() == pytest.approx([1, 1, 1])
    assert after[:, 1].abs().max() == pytest.approx(0.7)
    assert torch.equal(after[:, 0], after[:, 2])
    agree = (after[:, 1] * before[:, 1]).mean(dim=(1, 2))
    assert (agree > 0.2).all(), "the cells are not to be seen in it"


def test_a_blur_is_that_of_a_gaussian():
    from scipy.ndimage import gaussian_filter

    signs = torch.tensor([[[1, -1, -1, 1], [1, 1, 1, 1], [-1, 1, 1, -1], [-1, -1, -1, -1]]])
    cells = signs[0].repeat_interleave(8, 0).repeat_interleave(8, 1).numpy().astype(np.float64)
    expected = gaussian_filter(cells, 5.0, mode="nearest", truncate=3.0)
    expected /= np.abs(expected).max()
    found = paint(signs, smoothing=0.625)[0, 1].numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5)

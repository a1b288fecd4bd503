"""A codebook: one code a concept, whatever else is in the image; an artefact like any other."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from support.builders import TINY_ENCODER, make_pixels

from one4all.clustering import draw_together, k_means, most_alike
from one4all.codes import quantise, quantise_apart
from one4all.directions import discriminant_directions, principal_directions
from one4all.encoders import load_encoder
from one4all.errors import UsageError
from one4all.protectors.codebook import Codebook, fit_codebook, name_codebook
from one4all.protectors.config import STRENGTHS, CodebookConfig
from one4all.protectors.protector import Protector

CONFIG = CodebookConfig(num_concepts=3, pattern="strong")


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
    assert delta.shape == (60, 3, 32, 32)
    assert set(delta.unique().tolist()) == {-1.0, 1.0}
    for number in range(3):
        of_concept = delta[concept == number]
        assert (of_concept == of_concept[0]).all()
    assert len(delta.unique(dim=0)) == 3
    assert torch.equal(codebook.concepts(embeddings), assignment)
    assert torch.equal(codebook.vote(embeddings), codebook.bits_Kb[assignment])


def test_new_images_go_to_the_concept_of_their_kind_whatever_they_show_beside():
    embeddings, _ = clouds()
    codebook, _ = fit_codebook(embeddings, CONFIG, seed=0)
    noise = torch.randn(60, 8, generator=torch.Generator().manual_seed(2))
    later = F.normalize(embeddings + 0.1 * noise, dim=1)
    delta = codebook(later, torch.rand(60, 3, 4, 4))
    assert torch.equal(delta, codebook(embeddings, torch.zeros(60, 3, 4, 4)))


@pytest.mark.parametrize("directions", [64, 3])  # of three, little is left of some images
def test_no_bit_of_a_settled_embedding_turns_by_what_bfloat16_changes(directions):
    generator = torch.Generator().manual_seed(3)
    embeddings = F.normalize(torch.randn(300, 8, generator=generator), dim=1)
    config = CodebookConfig(num_concepts=20, directions=directions)
    codebook, _ = fit_codebook(embeddings, config, seed=0)
    settled = codebook.is_settled(embeddings)
    codes, turned = codebook.vote(embeddings), torch.zeros(300, dtype=torch.bool)
    for _ in range(50):
        step = F.normalize(torch.randn(300, 8, generator=generator), dim=1)
        turned |= (codebook.vote(embeddings + 0.02 * step) != codes).any(dim=1)
    assert turned.any()
    assert settled.any()
    assert not (turned & settled).any()


def test_same_seed_gives_the_same_codebook_and_another_one_other_codes():
    embeddings, _ = clouds()
    first, again, other = (fit_codebook(embeddings, CONFIG, seed=s)[0] for s in (0, 0, 1))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(first.bits_Kb, other.bits_Kb)


def test_like_names_share_a_code_and_an_image_gets_that_of_the_nearest_name():
    names, concept = clouds()
    codebook = name_codebook(names, CONFIG, seed=0)
    assert codebook.config.num_concepts == 60
    assert len(codebook.bits_Kb.unique(dim=0)) == 3
    delta = codebook(names, torch.zeros(60, 3, 4, 4))
    for number in range(3):
        assert len(delta[concept == number].flatten(1).unique(dim=0)) == 1


def test_like_concepts_have_like_codes():
    """Concepts on an arc: the farther apart two are, the more bits differ."""
    angle = torch.linspace(0, np.pi, 40)
    points = torch.stack([angle.cos(), angle.sin()], dim=1)
    bits = quantise(points, 8, torch.ones(40), seed=0).float()
    alike = bits @ bits.T / 8
    neighbours = alike.diagonal(1).mean()
    assert neighbours > 0.9
    assert alike[0, 39] < 0
    assert len(bits.unique(dim=0)) >= 4


def test_bits_of_a_code_are_used_alike_and_fewer_directions_than_bits_are_enough():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(500, 20, generator=generator)
    bits = quantise(points, 8, torch.ones(500), seed=0).float()
    assert bits.mean(dim=0).abs().max() < 0.15
    assert len(bits.unique(dim=0)) > 150
    for few in (points[:2], points[:, :1]):
        assert set(quantise(few, 8, torch.ones(len(few)), seed=0).unique().tolist()) == {-1, 1}


def test_clusters_have_codes_of_their_own_and_like_ones_still_differ_least():
    angle = torch.linspace(0, np.pi, 40)
    points = torch.stack([angle.cos(), angle.sin()], dim=1)
    apart = quantise_apart(points, 8, torch.ones(40), seed=0).float()
    assert len(quantise(points, 8, torch.ones(40), seed=0).unique(dim=0)) < 40
    assert len(apart.unique(dim=0)) == 40
    alike = apart @ apart.T / 8
    assert alike.diagonal(1).mean() > 0.5 > 0 > alike[0, 39]
    many = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    for num_bits, points in ((8, many), (15, many[:40]), (2, many[:5])):
        weights = torch.ones(len(points))
        codes = quantise(points, num_bits, weights, seed=1, starts=10)
        assert torch.equal(codes, quantise_apart(points, num_bits, weights, seed=1))


def test_a_kind_that_winds_is_one_cluster_once_neighbours_are_drawn_together():
    """Two arcs, each longer than the gap between them: k-means alone cuts them across."""
    angle = torch.linspace(0, 2.5, 100)
    arc = torch.stack([angle.cos(), angle.sin(), torch.zeros(100)], dim=1)
    points = F.normalize(torch.cat([arc, arc + torch.tensor([0, 0, 0.5])]), dim=1)
    truth = torch.arange(200) // 100

    def purity(features: torch.Tensor) -> float:
        cluster = k_means(features, 2, seed=0)[1]
        right = (cluster == truth).float().mean().item()
        return max(right, 1 - right)

    assert purity(points) < 0.7
    assert purity(draw_together(points, neighbours=10, rounds=1000)) == 1
    lengths = draw_together(points).norm(dim=1)
    assert torch.allclose(lengths, torch.ones(200))


def test_equal_and_lonely_points_stay_where_they_are():
    points = torch.eye(40)[torch.arange(80) % 40]
    assert torch.allclose(draw_together(points, neighbours=1), points, atol=1e-4)
    assert torch.equal(draw_together(points[:1]), points[:1])


def test_directions_are_those_of_the_largest_variance():
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 5.0, 0.1, 3.0])
    points = 7 + scales * torch.randn(2000, 4, generator=generator)
    mean, axes = principal_directions(points, 2)
    assert mean.tolist() == pytest.approx([7, 7, 7, 7], abs=0.3)
    assert axes.argmax(dim=0).tolist() == [1, 3]
    assert (axes.T @ axes).tolist() == [pytest.approx(row, abs=1e-5) for row in ([1, 0], [0, 1])]


def test_neighbours_are_of_one_kind_more_often_along_discriminant_directions():
    """Kinds differ along eight features; images of one kind along three others, at random."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(600) % 20
    kinds = F.normalize(torch.randn(20, 8, generator=generator), dim=1)
    pose = 0.5 * torch.randn(600, 3, generator=generator)
    noise = 0.05 * torch.randn(600, 11, generator=generator)
    points = F.normalize(torch.cat([kinds[kind], pose], dim=1) + noise, dim=1)

    def of_one_kind(directions: Callable[..., Any]) -> float:
        mean, axes = directions(points, 8)
        index, _ = most_alike(F.normalize((points - mean) @ axes, dim=1), 5)
        return (kind[index] == kind[:, None]).float().mean().item()

    assert of_one_kind(principal_directions) == pytest.approx(0.80, abs=0.02)
    assert of_one_kind(discriminant_directions) == pytest.approx(0.92, abs=0.02)


def test_directions_hold_where_images_are_equal_or_few():
    copies = F.normalize(torch.eye(3, 8)[torch.arange(60) % 3] + 0.1, dim=1)
    for points in (copies, copies[:2], copies[:1]):
        _, axes = discriminant_directions(points, 64)
        assert axes.shape == (8, 8)
        assert axes.isfinite().all()


def test_concepts_vote_bit_by_bit_unless_the_temperature_is_low():
    """The nearest concept stands alone; two others, hardly farther, agree on a bit."""
    for temperature, expected in ((0.04, 1), (0.0001, -1)):
        config = CodebookConfig(num_concepts=3, temperature=temperature)
        book = Codebook(config, embedding_dim=3)
        book.axes_DP.copy_(torch.eye(3))
        book.centres_KP.copy_(torch.eye(3))
        book.bits_Kb.copy_(torch.tensor([[1], [1], [-1]]).expand(3, 8))
        image = F.normalize(torch.tensor([[0.57, 0.57, 0.59]]), dim=1)
        assert book.concepts(image).tolist() == [2]
        assert set(book.vote(image).flatten().tolist()) == {expected}


@pytest.mark.parametrize(
    ("num_images", "between"),
    [(2, (2, 2)), (20, (10, 10)), (100, (16, 16)), (400, (16, 50)), (9_000_000, (16, 256))],
)
def test_number_of_concepts_is_looked_for_within_what_so_many_images_allow(num_images, between):
    assert CodebookConfig().concepts_between(num_images) == between
    assert CodebookConfig(num_concepts=7).concepts_between(num_images) == (7, 7)


def test_as_many_concepts_as_there_are_kinds():
    generator = torch.Generator().manual_seed(0)
    for num_kinds in (20, 40):
        kinds = torch.randn(num_kinds, 32, generator=generator)
        noise = torch.randn(800, 32, generator=generator)
        points = F.normalize(kinds[torch.arange(800) % num_kinds] + 0.5 * noise, dim=1)
        codebook, _ = fit_codebook(points, CodebookConfig(), seed=0)
        assert codebook.config.num_concepts == pytest.approx(num_kinds, rel=0.2)


def test_codes_follow_large_differences_though_neighbours_vary_along_them():
    """Eight kinds on two sides: far more bits differ from side to side than on one of them."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(800) % 8
    points = 0.03 * torch.randn(800, 16, generator=generator)
    points[:, 0] = 2.0
    points[:, 1] = torch.where(kind < 4, 0.8, -0.8) + 0.25 * torch.randn(800, generator=generator)
    points[torch.arange(800), 2 + kind] += 0.5
    points = F.normalize(points, dim=1)
    for seed in range(3):
        codebook, _ = fit_codebook(points, CodebookConfig(num_concepts=8), seed=seed)
        bits = codebook.vote(points)
        code = torch.stack([bits[kind == k].float().mean(0).sign() for k in range(8)])
        differ = (code[:, None] != code).sum(2).float()
        assert differ[:4, 4:].mean() > 2.5 * differ[:4, :4].sum() / 12


def test_more_concepts_than_images_are_refused():
    with pytest.raises(UsageError, match="61 concepts cannot be found in 60 images"):
        fit_codebook(clouds()[0], CodebookConfig(num_concepts=61), seed=0)


def test_look_has_a_name_or_is_spelt_out():
    assert CodebookConfig(pattern="strong").pattern == STRENGTHS["strong"]
    assert CodebookConfig(pattern={"in_place": 0}).pattern.smoothing == 0.2
    with pytest.raises(
        ValidationError, match="'loud', only discreet, balanced, strong, gray-proof"
    ):
        CodebookConfig(pattern="loud")


@pytest.mark.slow
@pytest.mark.parametrize("strength", STRENGTHS)
def test_codebook_protector_survives_saving_and_keeps_the_budget_on_every_layout(
    tmp_path, strength
):
    encoder = load_encoder(TINY_ENCODER)
    images = [make_pixels(40 + i, 50, channels, seed=i) for i, channels in enumerate((1, 2, 3, 4))]
    config = CodebookConfig(num_concepts=2, pattern=strength)
    codebook = Codebook(config, encoder.embedding_dim)  # all bits are 1: green, or upright stripes
    protector = Protector.assemble(
        TINY_ENCODER, encoder, codebook, name="b", working_size=32, config=config, epsilon_levels=5
    )
    protector.save(tmp_path / "book")
    loaded = Protector.load(str(tmp_path / "book"))
    assert loaded.card.content_hash == protector.card.content_hash
    for clean, protected, again in zip(
        images, protector.protect(images), loaded.protect(images), strict=True
    ):
        np.testing.assert_array_equal(protected, again)
        difference = protected.astype(int) - clean
        assert np.abs(difference).max() <= 5
        if strength != "gray-proof":
            assert difference[:, :, 0 if clean.shape[2] < 3 else 1].min() >= 0
        if clean.shape[2] in (2, 4):
            assert not difference[:, :, -1].any()
        if strength == "strong":
            colours = [5] if clean.shape[2] < 3 else [-5, 5, -5]
            in_range = (clean >= 5) & (clean <= 250)
            expected = np.broadcast_to(colours + [0] * (clean.shape[2] - len(colours)), clean.shape)
            np.testing.assert_array_equal(difference[in_range], expected[in_range])

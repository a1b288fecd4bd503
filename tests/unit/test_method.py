"""Generator and objective against slow, obvious references."""

import math

import pytest
import torch
import torch.nn.functional as F

from one4all.errors import ConfigError
from one4all.protectors.config import GENERATOR_PRESETS, GeneratorConfig
from one4all.protectors.generator import Generator, count_multiply_adds
from one4all.training.objectives.concept import PRESETS as OBJECTIVES
from one4all.training.objectives.concept import (
    ConceptObjectiveConfig,
    concept_objective,
    normalised_entropy,
    select_targets,
)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def small(norm: str = "group", **options) -> Generator:
    torch.manual_seed(0)
    return Generator(GeneratorConfig(width=8, num_blocks=1, norm=norm, **options), 64)


# --- generator -------------------------------------------------------------------------------


@pytest.mark.parametrize("stem_stride", [1, 2, 4])
def test_perturbation_is_bounded_and_on_its_grid(stem_stride):
    generator = small(stem_stride=stem_stride).eval()
    generator.head.weight.data *= 1000
    with torch.no_grad():
        delta = generator(unit(2, 64), torch.rand(2, 3, 64, 96))
    assert delta.shape == (2, 3, 64 // stem_stride, 96 // stem_stride)
    assert 0.99 < delta.abs().max() <= 1


@pytest.mark.parametrize(("norm", "train"), [("group", True), ("group", False), ("batch", False)])
def test_output_does_not_depend_on_the_rest_of_the_batch(norm, train):
    generator = small(norm).train(train)
    embedding, image = unit(4, 64), torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        together = generator(embedding, image)
        alone = torch.cat([generator(embedding[i : i + 1], image[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_embedding_is_not_ignored():
    """Scaled, the embedding moves the output; unscaled, as in the released code, hardly."""
    torch.manual_seed(0)
    config = GeneratorConfig(width=8, num_blocks=1, norm="batch", embedding_channels=0)
    generator = Generator(config, 512).eval()
    embedding, image = unit(4, 512), torch.rand(4, 3, 32, 32)

    def effect() -> float:
        with torch.no_grad():
            delta, opposite = generator(embedding, image), generator(-embedding, image)
        return float((opposite - delta).norm() / delta.norm())

    scaled = effect()
    generator.embedding_scale = 1.0
    assert scaled > 0.1
    assert scaled > 3 * effect()


def test_default_costs_at_most_a_twentieth_of_the_paper_preset():
    costs = {
        name: count_multiply_adds(
            Generator(config, 512) if name == "compact" else _meta(config),
            embedding_dim=512,
            size=224,
        )
        for name, config in GENERATOR_PRESETS.items()
    }
    assert costs["paper"] == pytest.approx(99e9, rel=0.01)  # as counted on the released network
    assert costs["compact"] <= costs["paper"] / 20


def _meta(config: GeneratorConfig) -> Generator:
    with torch.device("meta"):
        return Generator(config, 512)


def test_working_size_that_does_not_fit_is_named():
    with pytest.raises(ConfigError, match="33x32 is not a multiple of 8"):
        small()(unit(1, 64), torch.rand(1, 3, 33, 32))


# --- objective -------------------------------------------------------------------------------


def reference(clean, protected, concepts, config):
    """Eq. 4, one image and one concept at a time."""

    def cosine(a, b):
        return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))

    mean = [sum(float(c[d]) for c in concepts) / len(concepts) for d in range(len(concepts[0]))]
    l1 = l2 = 0.0
    chosen = []
    for e, p in zip(clean, protected, strict=True):
        selecting = e if config.select_by == "clean" else p
        ranked = sorted(range(len(concepts)), key=lambda i: -cosine(selecting, concepts[i]))
        similar = ranked[: config.num_similar]
        if config.centre_concepts:

            def centred(i, selecting=selecting):
                c = [float(x) - m for x, m in zip(concepts[i], mean, strict=True)]
                return cosine(selecting, c) / math.sqrt(sum(x * x for x in c))

            opposite = min(range(len(concepts)), key=centred)
        else:
            opposite = ranked[-1]
        chosen.append(opposite)
        l1 += (1 - cosine(p, concepts[opposite])) / len(clean)
        l2 += sum(1 - cosine(p, concepts[i]) for i in similar) / config.num_similar / len(clean)
    lambda_ = min(max(abs(l1 / l2), 0.1), 10) if config.weighting == "ratio" else config.lambda_
    return l1 - lambda_ * l2, l1, l2, lambda_, chosen


@pytest.mark.parametrize("select_by", ["clean", "protected"])
@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("weighting", ["ratio", "fixed"])
def test_each_term_equals_the_reference(select_by, centre, weighting):
    config = ConceptObjectiveConfig(
        select_by=select_by,
        num_similar=3,
        centre_concepts=centre,
        weighting=weighting,
        lambda_=0.7,
    )
    clean, protected, concepts = unit(5, 16), unit(5, 16, seed=1), unit(11, 16, seed=2)
    terms = concept_objective(clean, protected, concepts, config)
    loss, l1, l2, lambda_, chosen = reference(clean, protected, concepts, config)
    assert terms.loss.item() == pytest.approx(loss, abs=1e-5)
    assert float(terms.l1) == pytest.approx(l1, abs=1e-5)
    assert float(terms.l2) == pytest.approx(l2, abs=1e-5)
    assert float(terms.lambda_) == pytest.approx(lambda_, abs=1e-5)
    assert terms.targets.opposite.tolist() == chosen


def test_ratio_loss_is_zero_in_value_but_its_gradient_is_alive():
    protected = unit(5, 16, seed=1).requires_grad_()
    terms = concept_objective(unit(5, 16), protected, unit(11, 16, seed=2), OBJECTIVES["paper"])
    terms.loss.backward()
    assert abs(terms.loss.item()) < 1e-5
    assert protected.grad is not None
    assert protected.grad.norm() > 1e-3


@pytest.mark.parametrize("preset", sorted(OBJECTIVES))
def test_descent_moves_towards_the_opposite_and_away_from_the_similar(preset):
    """The sign trap: with d = cosine, as printed, the reverse would happen."""
    config = OBJECTIVES[preset].model_copy(update={"select_by": "clean"})
    clean, concepts = unit(5, 16), unit(11, 16, seed=2)
    raw = clean.clone().requires_grad_()
    before = concept_objective(clean, F.normalize(raw, dim=1), concepts, config)
    before.loss.backward()
    after = concept_objective(
        clean, F.normalize(raw.detach() - 0.05 * raw.grad, dim=1), concepts, config
    )
    assert after.cosine_opposite > before.cosine_opposite
    assert after.l2 > before.l2


def test_own_concept_is_among_the_similar_ones():
    concepts = unit(11, 16)
    targets = select_targets(concepts[:4], concepts, num_similar=3, centre=True)
    assert targets.similar[:, 0].tolist() == [0, 1, 2, 3]


def test_small_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="at least 6 are needed"):
        select_targets(unit(2, 16), unit(5, 16), num_similar=5, centre=True)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([8, 0, 0, 0], 0.0), ([2, 2, 2, 2], 1.0), ([4, 4, 0, 0], 0.5), ([1, 1, 0, 0], 1.0), ([0], 0)],
)
def test_entropy_is_a_share_of_what_is_possible(counts, expected):
    assert float(normalised_entropy(torch.tensor(counts))) == pytest.approx(expected)

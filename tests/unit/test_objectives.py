"""The seam for objectives: settings by name, and an objective unknown to the trainer."""

import json
from contextlib import nullcontext
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.builders import TINY_ENCODER, TINY_GENERATOR, write_corpus
from torch import nn

from one4all.concepts import ConceptBank
from one4all.errors import ConfigError
from one4all.training.objectives import (
    DEFAULT_OBJECTIVE,
    OBJECTIVES,
    RESERVED_SCALARS,
    Objective,
    ObjectiveConfig,
    ObjectiveContext,
    TrainingBatch,
    objective_presets,
)
from one4all.training.objectives.concept import ConceptObjective
from one4all.training.trainer import GeneratorTrainer, TrainerConfig
from pipelines.settings import load_config
from pipelines.train.config import TrainConfig
from pipelines.train.progress import CURVES_FILE, METRICS_FILE, RunLog


class FaintConfig(ObjectiveConfig):
    """Settings of `Faint`."""

    name: Literal["faint"] = "faint"
    weight: float = 10.0
    scalar: str = "visibility"


class Faint(Objective):
    """Faint perturbations that a small network of its own can read, at a random place."""

    config_type = FaintConfig

    def __init__(self, config, context) -> None:
        super().__init__(config, context)
        self.config, self.context = config, context
        self.reader = nn.Linear(3, 2)
        self.seen: list[tuple[int, ...]] = []

    def check(self) -> None:
        """Refuses what no perturbation can be."""
        if self.config.weight < 0:
            raise ConfigError("a negative weight makes perturbations strong")

    def forward(self, batch):
        """Mean square of the perturbation, and a reading of one pixel of the protected image."""
        visibility = (batch.delta_BChw * 255 / self.context.epsilon_levels).square().mean()
        top, left = torch.randint(self.context.working_size, (2,)).tolist()
        answer = self.reader(batch.protected_BCHW[:, :, top, left])
        reading = F.cross_entropy(answer, (batch.embedding_BD[:, 0] > 0).long())
        self.seen = [tuple(tensor.shape) for tensor in vars(batch).values()]
        loss = self.config.weight * visibility + reading
        return loss, {self.config.scalar: visibility.detach(), "place": float(top)}


@pytest.fixture
def faint(monkeypatch):
    """A second objective, registered as a line in the registry would."""
    monkeypatch.setitem(OBJECTIVES, "faint", Faint)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return str(write_corpus(tmp_path_factory.mktemp("corpus") / "c", num_shards=3, num_samples=8))


def config_for(corpus: str, **options) -> TrainerConfig:
    defaults = dict(
        source=corpus,
        encoder=TINY_ENCODER,
        generator=TINY_GENERATOR,
        vocabulary="broad",
        steps=4,
        batch_size=4,
        learning_rate=2e-3,
    )
    return TrainerConfig(**(defaults | options))


# --- settings --------------------------------------------------------------------------------


def test_each_objective_is_registered_under_the_name_in_its_settings():
    presets = objective_presets()
    assert presets["default"] == DEFAULT_OBJECTIVE
    assert {"default", "paper"} <= presets.keys()
    assert not presets.keys() & OBJECTIVES.keys()
    assert len(presets) == sum(len(kind.presets) for kind in OBJECTIVES.values())
    for name, kind in OBJECTIVES.items():
        assert kind.config_type.model_fields["name"].default == name
        assert all(preset.name == name for preset in kind.presets.values())


@pytest.mark.usefixtures("faint")
def test_settings_are_read_by_name_and_survive_the_way_to_a_worker():
    for text, expected in (
        ("paper", objective_presets()["paper"]),
        ("concept", DEFAULT_OBJECTIVE),
        ("{num_similar: 3}", DEFAULT_OBJECTIVE.model_copy(update={"num_similar": 3})),
        ("faint", FaintConfig()),
        ("{name: faint, weight: 2}", FaintConfig(weight=2)),
    ):
        config = load_config(TrainConfig, None, [f"objective={text}"])
        assert config.objective == expected
        assert TrainConfig.model_validate_json(config.model_dump_json()) == config
        assert TrainConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("big", "no objective 'big', only concept; presets: default, paper"),
        ("{name: [1]}", r"no objective '\[1\]', only concept"),
        ("{num_simlar: 3}", "'concept' has no setting 'num_simlar', only name, select_by, num_si"),
        ("{num_similar: 0}", "objective.num_similar: .*greater than or equal to 1"),
        ("3", "objective: "),
    ],
)
def test_wrong_settings_are_explained_with_their_place(text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(TrainConfig, None, [f"objective={text}"])


# --- training --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("faint")
def test_scalars_of_a_new_objective_are_logged_and_plotted(corpus, tmp_path):
    trainer = GeneratorTrainer(config_for(corpus, objective={"name": "faint"}, steps=2))
    trainer.check()
    with RunLog(str(tmp_path)) as log:
        for _ in trainer.steps():
            log.add(trainer.metrics() | {"world_size": 1, "images_per_second": 1.0})
    entries = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2]
    assert entries == log.history
    for entry in entries:
        assert entry.keys() == RESERVED_SCALARS | {"visibility", "place"}
        assert entry["loss"] > 10 * entry["visibility"] > 0
    shown = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").glob("events*"))
    assert b"visibility" in shown
    with Image.open(tmp_path / CURVES_FILE) as curves:  # loss, learning rate, visibility, place
        two_rows = curves.height
    assert two_rows > 500
    size = TINY_ENCODER.input_size
    assert trainer.objective.seen == [
        (4, 3, size, size),
        (4, trainer.encoder.embedding_dim),
        (4, 3, size // 2, size // 2),
        (4, 3, size, size),
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("faint")
def test_networks_of_an_objective_are_trained_saved_and_resumed(corpus, tmp_path):
    config = config_for(corpus, objective="faint", steps=6)
    whole, first, second = (GeneratorTrainer(config) for _ in range(3))
    start = whole.objective.reader.weight.detach().clone()
    places = [whole.metrics()["place"] for _ in whole.steps()]
    assert not torch.equal(whole.objective.reader.weight, start)
    for step in first.steps():
        if step == 3:
            first.save(tmp_path)
            break
    torch.manual_seed(99)  # whatever a new process drew
    second.load(tmp_path)
    assert [second.metrics()["place"] for _ in second.steps()] == places[3:]
    assert len(set(places)) > 1
    for module in ("generator", "objective"):
        expected, found = (getattr(t, module).state_dict() for t in (whole, second))
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor)


@pytest.mark.slow
@pytest.mark.usefixtures("faint")
def test_protector_names_concepts_only_if_it_was_trained_towards_some(corpus):
    cards = [
        GeneratorTrainer(config_for(corpus, objective=name)).protector("p", {}).card
        for name in ("concept", "faint")
    ]
    assert [card.vocabulary for card in cards] == ["broad", ""]
    assert [bool(card.concept_bank_hash) for card in cards] == [True, False]


@pytest.mark.slow
@pytest.mark.usefixtures("faint")
def test_what_an_objective_cannot_do_is_said_before_training(corpus):
    negative = config_for(corpus, objective={"name": "faint", "weight": -1})
    with pytest.raises(ConfigError, match="negative weight"):
        GeneratorTrainer(negative).check()
    taken = config_for(corpus, objective={"name": "faint", "scalar": "loss"})
    with pytest.raises(ConfigError, match="'faint' names a scalar 'loss'"):
        GeneratorTrainer(taken).check()


@pytest.mark.slow
def test_checkpoint_from_before_there_was_a_choice_of_objectives_is_resumed(corpus, tmp_path):
    trainer = GeneratorTrainer(config_for(corpus))
    next(trainer.steps())
    trainer.save(tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    del state["objective"]
    torch.save(state, tmp_path / "state.pt")
    resumed = GeneratorTrainer(config_for(corpus))
    resumed.load(tmp_path)
    assert resumed.step_number == 1


@pytest.fixture
def concept_objective() -> ConceptObjective:
    """Eq. 4 on 20 concepts, whose encoder takes the mean of 20 channels for an embedding."""
    context = ObjectiveContext(
        encode_image=lambda image_BCHW: F.normalize(image_BCHW.mean(dim=(2, 3)), dim=1),
        embedding_dim=20,
        concept_bank=lambda: ConceptBank("v", ("c",) * 20, (), torch.eye(20), hash="h"),
        working_size=8,
        epsilon_levels=8,
    )
    return ConceptObjective(DEFAULT_OBJECTIVE, context)


def test_entropy_of_opposites_is_of_the_latest_images_only(concept_objective):
    """So that a collapse to a few hubs shows, however long the run was healthy."""

    def entropy_after(embedding_BD: torch.Tensor) -> float:
        image = torch.rand(len(embedding_BD), 20, 8, 8)
        batch = TrainingBatch(image, embedding_BD, image, image)
        return float(concept_objective(batch)[1]["opposite_entropy"])

    assert entropy_after(-torch.eye(20).repeat(30, 1)) == pytest.approx(1, abs=0.01)
    hub = -torch.eye(20)[:1].expand(16, -1)
    entropies = [entropy_after(hub) for _ in range(4)]
    assert entropies == sorted(entropies, reverse=True)
    assert entropies[0] > 0.5
    assert entropies[-1] == 0


def test_objective_asks_the_device_for_no_value(concept_objective, monkeypatch):
    """A meta tensor has none: whoever asks for one fails, where a GPU would make the CPU wait."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no meta device
    image = torch.rand(6, 20, 8, 8, device="meta")
    batch = TrainingBatch(image, image[:, :, 0, 0], image, image)
    for objective in objective_presets().values():
        concept_objective.config = objective
        loss, scalars = concept_objective(batch)
        assert {loss.device.type} == {value.device.type for value in scalars.values()} == {"meta"}


def test_images_that_are_only_looked_at_leave_no_trace(concept_objective):
    image = torch.rand(6, 20, 8, 8)
    concept_objective.eval()
    concept_objective(TrainingBatch(image, image[:, :, 0, 0], image, image))
    assert len(concept_objective._recent_opposites) == 0


def test_loss_is_computed_in_float32_within_autocast(concept_objective):
    """As on a GPU: cosines of bfloat16 would have two decimals."""
    image = torch.rand(6, 20, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = TrainingBatch(image, F.normalize(image[:, :, 0, 0], dim=1), image, image)
    expected, scalars = concept_objective(batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, within = concept_objective(batch)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert torch.equal(within["l2"], scalars["l2"])

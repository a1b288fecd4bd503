"""What training would take, told without images, weights or Ray."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.builders import TINY_ENCODER, TINY_GENERATOR, write_corpus

from one4all.errors import ConfigError, UsageError
from one4all.storage import LocalStorage
from one4all.training.cost import cost_of_an_image
from one4all.training.trainer import GeneratorTrainer, TrainerConfig
from pipelines.settings import load_config
from pipelines.train.config import TrainConfig
from pipelines.train.plan import plan_training

CONFIGS = Path(__file__).parents[2] / "configs" / "train"


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_corpus(tmp_path / "c", num_shards=5, num_samples=4)


def config_for(corpus: Path, **options) -> TrainConfig:
    defaults = dict(source=str(corpus), run_folder=str(corpus.parent / "run"), gpus_per_worker=0)
    return TrainConfig(encoder=TINY_ENCODER, generator=TINY_GENERATOR, **(defaults | options))


@pytest.mark.slow
def test_activations_are_those_that_a_real_step_keeps(corpus):
    """Beside what the loss keeps, which no image is large enough to see."""
    config = TrainerConfig(
        source=str(corpus),
        encoder={"kind": "embedded", "input_size": 64},
        generator=TINY_GENERATOR,
        vocabulary="broad",
        batch_size=2,
    )
    trainer = GeneratorTrainer(config)
    weights = {
        tensor.data_ptr()
        for module in (trainer.encoder, trainer.generator)
        for tensor in module.state_dict().values()
    }
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        trainer.step(torch.zeros(2, 64, 64, 3, dtype=torch.uint8))
    real = sum(kept.values()) / 2
    assert cost_of_an_image(config).activation_bytes == pytest.approx(real, rel=0.15)


def test_plan_counts_steps_epochs_shards_and_money(corpus, monkeypatch):
    def no_reading(self, key, **options):
        raise AssertionError(f"{key} was opened")

    monkeypatch.setattr(LocalStorage, "open", no_reading)
    config = config_for(
        corpus, steps=600, batch_size=4, accumulate_batches=3, num_workers=[2, 5], gpus_per_worker=1
    )
    found = plan_training(config, num_images=300, images_per_second=10, price_per_hour=2.5)
    assert (found.num_shards, found.num_images, found.on_gpu) == (5, 300, True)
    two, five = found.estimates
    assert (two.images_per_step, five.images_per_step) == (24, 60)
    assert (two.epochs, five.epochs) == (48, 120)
    assert two.seconds == five.seconds == 720
    assert (two.gpu_hours, two.price) == (0.4, 1.0)
    assert found.device_bytes > found.cost.encoder_bytes + found.cost.generator_bytes
    kept = config.model_copy(update={"validation_share": 0.2})
    found = plan_training(kept, num_images=300, images_per_second=10)
    assert found.estimates[0].epochs == pytest.approx(60)


@pytest.mark.slow
def test_images_and_speed_are_taken_from_where_they_are_written_down(corpus):
    config = config_for(corpus)
    found = plan_training(config)
    assert (found.num_images, found.estimates[0].epochs) == (None, None)
    assert "guess" in found.speed_from
    (corpus / "sizes.json").write_text(json.dumps({f"shard-{i:03d}.tar": 4 for i in range(5)}))
    run = Path(config.run_folder)
    run.mkdir()
    entries = [{"step": i, "images_per_second": 12.0, "world_size": 3} for i in range(5)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    found = plan_training(config)
    assert (found.num_images, found.images_per_second) == (20, 4.0)
    assert "measured" in found.speed_from
    (corpus / "sizes.json").write_text("[1]")
    with pytest.raises(UsageError, match="must map names of shards"):
        plan_training(config)


@pytest.mark.slow
def test_imagenet_is_planned_without_weights(corpus):
    config = load_config(
        TrainConfig, CONFIGS / "imagenet.yaml", [f"source={corpus}", f"run_folder={corpus}/run"]
    )
    found = plan_training(config, num_images=1_281_167)
    four, eight = found.estimates
    assert (four.num_workers, eight.num_workers) == (4, 8)
    assert eight.epochs == pytest.approx(200, rel=0.01)
    assert found.cost.working_size == 224
    assert found.cost.encoder_bytes == pytest.approx(151e6 * 4, rel=0.01)
    assert found.num_shards < 8
    odd = config.model_copy(
        update={"encoder": config.encoder.model_copy(update={"model_name": "ViT-B-33"})}
    )
    with pytest.raises(ConfigError, match="no model 'ViT-B-33'"):
        plan_training(odd)


@pytest.mark.slow
@pytest.mark.parametrize("verb", [["plan", "train"], ["train", "--dry-run"]], ids=" ".join)
def test_plan_of_training_starts_no_ray(corpus, verb):
    code = (
        "import sys; from pipelines.__main__ import main\n"
        "try: main()\n"
        "finally: print('ray' in sys.modules)"
    )
    arguments = [*verb, str(corpus), "--set", "num_workers=[1, 7]", "--set", "gpus_per_worker=0"]
    arguments += ["--set", "encoder={kind: embedded, input_size: 64}", "--num-images", "20"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=corpus.parent,
    )
    *lines, uses_ray = done.stdout.splitlines()
    assert (done.returncode, uses_ray) == (0, "False"), done.stderr
    assert lines[0].startswith("1,000 steps; 5 shards")
    assert "1 workers: 8 images a step, 400 epochs, 5 shards a rank" in lines[-2]
    assert "7 workers: 56 images a step, 2,800 epochs, all shards a rank" in lines[-1]
    assert sorted(path.name for path in corpus.parent.iterdir()) == ["c"]

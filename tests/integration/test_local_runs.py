"""A run on one machine needs no Ray: not to fit, nor to protect, nor to verify."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.builders import make_samples, make_tar, write_corpus

from one4all.errors import One4AllError, UsageError
from pipelines.protect.config import ProtectConfig
from pipelines.protect.job import protect
from pipelines.verify import VerifyConfig, verify

# Without "if __name__ ...": a program that calls us must not have to be written for our workers.
WITHOUT_RAY = """
import sys
sys.modules["ray"] = None  # whoever imports it fails
from pipelines.protect import own_protector
from pipelines.protect.config import ProtectConfig
from pipelines.protect.job import protect
from pipelines.verify import VerifyConfig, verify

own_protector.FEWEST_IMAGES = 10
source, destination = sys.argv[1:]
one = {"num_cpus": 1}
result = protect(source, destination, ProtectConfig(batch_size=4, ray=one))
print(result.exit_code, result.num_images)
print(verify(source, destination, VerifyConfig(recompute=1.0, ray=one)).problems)
"""

# It takes PyTorch seconds to load, and workers alone have use for it.
WITHOUT_TORCH = """
import sys
from pipelines.cli.app import app

one = ["--set", "ray.num_cpus=1"]
for verb in (["protect", *sys.argv[1:], "--protector=default"], ["verify", *sys.argv[1:]]):
    app([*verb, *one], standalone_mode=False)
    print(sorted({"torch", "openvino", "ray"} & sys.modules.keys()), flush=True)
"""


def _run(program: str, corpus: Path, output: Path) -> subprocess.CompletedProcess[str]:
    path = output.with_suffix(".py")
    path.write_text(program)
    return subprocess.run(
        [sys.executable, path, corpus, output],
        env=os.environ | {"RAY_ADDRESS": "", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def test_all_of_it_without_ray(tmp_path):
    run = _run(WITHOUT_RAY, write_corpus(tmp_path / "in", num_shards=2), tmp_path / "out")
    assert run.stdout == "0 10\n[]\n", run.stderr
    assert "fitted" in (tmp_path / "out" / "_one4all" / "binding.json").read_text()


def test_a_driver_loads_no_torch(tmp_path):
    run = _run(WITHOUT_TORCH, write_corpus(tmp_path / "in", num_shards=1), tmp_path / "out")
    assert run.stdout.splitlines().count("[]") == 2, run.stdout + run.stderr
    assert len(list((tmp_path / "out").glob("*.tar"))) == 1


def test_workers_make_the_same_bytes_however_many(tmp_path, protector_folder):
    corpus = write_corpus(tmp_path / "in", num_shards=3)
    (corpus / "cut.tar").write_bytes(make_tar(make_samples(3))[:4096])
    made = []
    for num_workers in (1, 2):
        out = tmp_path / f"out-{num_workers}"
        config = ProtectConfig(
            protector=str(protector_folder),
            batch_size=4,
            runner="local",
            num_workers=num_workers,
            cpus_per_worker=1,
            wave_shards=2,
            ray={"num_cpus": 2},
        )
        result = protect(str(corpus), str(out), config)
        assert (result.exit_code, result.num_done) == (3, 3)
        assert "truncated" in result.quarantined["cut.tar"]
        made.append({path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))})
    assert made[0] == made[1]
    assert len(made[0]) == 3
    problems = verify(str(corpus), str(out), VerifyConfig(runner="local")).problems
    assert [problem.partition(":")[0] for problem in problems] == ["cut.tar"]


def test_worker_that_this_machine_cannot_hold_ends_the_run(tmp_path, protector_folder):
    corpus = write_corpus(tmp_path / "in", num_shards=1)
    config = ProtectConfig(protector=str(protector_folder), batch_size=4, runner="local")
    too_large = config.model_copy(update={"cpus_per_worker": 7000})
    with pytest.raises(UsageError, match="7000 CPUs and 0 GPUs does not fit on this machine"):
        protect(str(corpus), str(tmp_path / "out"), too_large)
    assert protect(str(corpus), str(tmp_path / "out"), config).exit_code == 0, "the lease is held"


def test_protector_that_changes_during_the_run_is_refused(tmp_path, protector_folder, monkeypatch):
    """Whatever lies at its place by then, no worker writes with another one."""
    from pipelines.protect import runner

    corpus = write_corpus(tmp_path / "in", num_shards=1)
    make = runner.Job.worker

    def replaced(self, **options):
        card = Path(self.config.protector) / "card.json"
        other_budget = json.loads(card.read_text()) | {"epsilon_levels": 5}
        card.write_text(json.dumps(other_budget))
        return make(self, **options)

    monkeypatch.setattr(runner.Job, "worker", replaced)
    folder = tmp_path / "protector"
    folder.mkdir()
    for path in protector_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = ProtectConfig(protector=str(folder), batch_size=4, runner="local")
    with pytest.raises(One4AllError, match=r"protector .* changed, or another copy") as raised:
        protect(str(corpus), str(tmp_path / "out"), config)
    assert raised.value.exit_code == 1
    assert not list((tmp_path / "out").glob("*.tar"))

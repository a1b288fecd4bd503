"""Optional packages: what is missing is one sentence with the pip command."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from one4all import extras, report
from one4all.corpus import Unit, read_samples
from one4all.encoders import EncoderConfig, load_encoder
from one4all.errors import UsageError
from one4all.extras import require
from one4all.storage import open_storage
from one4all.visibility import visibility
from pipelines.local_s3 import local_s3
from pipelines.ray_session import ray_session
from pipelines.settings import RayConfig

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def start_s3():
    with local_s3("bucket"):
        pass


def write_report():
    report.write_report(Path("unwritten.html"), title="", summary="", sections=[])


def measure_visibility():
    image = np.zeros((8, 8, 3), np.uint8)
    visibility(image, image)


def read_parquet():
    unit = Unit("a.parquet", (), container="parquet")
    next(read_samples(open_storage("unread"), unit))


def start_ray():
    with ray_session(RayConfig()):
        pass


@pytest.mark.parametrize(
    ("module", "extra", "use"),
    [
        ("boto3", "s3", lambda: open_storage("s3://bucket/prefix")),
        ("open_clip", "clip", lambda: load_encoder(EncoderConfig(kind="open_clip"))),
        ("jinja2", "jobs", write_report),
        ("moto", "demo", start_s3),
        ("pyarrow", "parquet", read_parquet),
        ("ray", "jobs", start_ray),
        ("flip_evaluator", "visibility", measure_visibility),
        ("skimage", "visibility", measure_visibility),
        ("ssimulacra2", "visibility", measure_visibility),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_missing_package_is_a_sentence_with_the_pip_command(monkeypatch, module, extra, use):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError) as error:
        use()
    assert str(error.value) == f"{module} is not installed: pip install 'one4all[{extra}]'"


def test_package_that_is_there_is_not_imported():
    ask = "import sys; from one4all.extras import require; require('ray', 'jobs'); "
    ask += "print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("module", ["typer", "tqdm", "yaml"])
def test_command_line_without_its_packages_is_a_sentence_and_exit_code_two(module):
    ask = f"import sys; sys.modules[{module!r}] = None; import pipelines.__main__ as m; m.main()"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    message = f"one4all: {module} is not installed: pip install 'one4all[jobs]'\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_every_extra_that_is_asked_for_exists():
    """What `require` names is an extra of the project that installs it, and all has it, too."""
    sources = [*(ROOT / "one4all").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")]
    asked = {
        call
        for path in sources
        for call in re.findall(r'require\("(\w+)", "(\w+)"\)', path.read_text("utf-8"))
    }
    assert ("boto3", "s3") in asked
    distributions = {
        "flip_evaluator": "flip-evaluator",
        "open_clip": "open_clip_torch",
        "skimage": "scikit-image",
        "sklearn": "scikit-learn",
        "yaml": "pyyaml",
    }
    for module, extra in asked:
        names = {re.match(r"[\w-]+", line)[0] for line in EXTRAS[extra]}
        assert distributions.get(module, module) in names, f"one4all[{extra}] has no {module}"
    assert set(re.findall(r"^    (\w+)  ", extras.__doc__, re.MULTILINE)) == {*EXTRAS} - {"dev"}


def test_encoders_are_pinned_exactly_as_protectors_are_bound_to_them():
    pins = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    encoders = [line for line in PROJECT["dependencies"] if line.startswith("efficientnet")]
    assert len(encoders) == 2
    assert set(encoders) <= set(pins)


def test_unknown_package_is_named():
    with pytest.raises(UsageError, match="nothing_of_the_kind is not installed"):
        require("nothing_of_the_kind", "all")

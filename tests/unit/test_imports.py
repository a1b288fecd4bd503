"""What is loaded, and when: PyTorch takes seconds, for which not everybody should wait."""

import subprocess
import sys
from importlib.metadata import version

import pytest

import one4all


@pytest.mark.parametrize("module", ["one4all", "pipelines.cli.app", "pipelines.submit"])
def test_only_who_computes_waits_for_torch(module):
    loaded = "sorted({'numpy', 'pydantic', 'torch', 'ray'} & sys.modules.keys())"
    ask = f"import sys, {module}; print({loaded})"
    done = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_a_look_at_the_ledger_does_not_wait_for_torch():
    ask = "import sys, pipelines.status, one4all.storage.s3; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "False"


def test_every_public_name_is_there():
    assert set(one4all.__all__) <= set(dir(one4all))
    assert one4all.__version__ == version("one4all")
    for name in {*one4all.__all__} - {"__version__"}:
        assert getattr(one4all, name).__module__.startswith("one4all.")
    with pytest.raises(AttributeError, match="'one4all' has no attribute 'nothing'"):
        _ = one4all.nothing

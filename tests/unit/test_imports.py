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
    modules = "pipelines.status, pipelines.train.status, one4all.storage.s3"
    ask = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "False"


def test_every_public_name_is_there_and_is_what_it_says():
    assert one4all.__version__ == version("one4all")
    names = {*one4all.__all__} - {"__version__"}
    assert names == set(one4all._HOMES) <= set(dir(one4all))
    for name in names:
        found = getattr(one4all, name)
        assert found.__name__ == name
        assert found.__module__.startswith("one4all.")
        assert found.__doc__
    with pytest.raises(AttributeError, match="'one4all' has no attribute 'nothing'"):
        _ = one4all.nothing

"""The examples for schedulers: each exit code is what the page says; their commands exist.

Airflow and Dagster are run by an interpreter that has them: this one, or ORCHESTRATORS_PYTHON.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from pipelines.cli.app import app
from pipelines.cli.operating import parse

EXAMPLES = Path(__file__).parents[2] / "examples" / "orchestrators"
PYTHON = os.environ.get("ORCHESTRATORS_PYTHON", sys.executable)
VERBS = typer.main.get_command(app)
RECORD = {"run_id": "c0ffee", "num_images": 7, "exit_code": 0}


def needs(module: str) -> None:
    asked = [PYTHON, "-c", f"import importlib.util as u; exit(u.find_spec({module!r}) is None)"]
    if subprocess.run(asked, check=False).returncode:
        pytest.skip(f"{module} is not installed in {PYTHON}; see ORCHESTRATORS_PYTHON")


@pytest.fixture
def stand_in(tmp_path):
    """An environment with a `one4all` that notes what it is called with, and ends as it is told."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "one4all"
    program.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {tmp_path}/called\n'
        f"if [ \"$1\" = status ]; then echo '{json.dumps([RECORD])}'; exit 0; fi\n"
        f"exit $(cat {tmp_path}/code)\n"
    )
    program.chmod(0o755)
    return {
        "PATH": f"{tmp_path}/bin:{os.path.dirname(PYTHON)}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "AIRFLOW_HOME": str(tmp_path / "airflow"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_FOLDER": str(tmp_path / "dags"),
        "DAGSTER_DISABLE_TELEMETRY": "1",
    }


def check_calls(tmp_path, *, with_record: bool) -> None:
    """What was called exists, and the record was asked for only where work goes on."""
    calls = (tmp_path / "called").read_text().splitlines()
    for call in calls:
        parse(VERBS, shlex.split(call))
    assert calls[0].startswith("submit --submission-id protect-")
    assert any(call.startswith("status") for call in calls) == with_record


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_airflow_carries_on_skips_or_fails_by_exit_code(tmp_path, stand_in):
    needs("airflow")
    (tmp_path / "dags").mkdir()
    shutil.copy(EXAMPLES / "airflow_dag.py", tmp_path / "dags")
    for words in (["db", "migrate"], ["dags", "reserialize"]):
        command = [PYTHON, "-m", "airflow", *words]
        done = subprocess.run(command, env=stand_in, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    program = (
        f"import runpy; dag = runpy.run_path('{tmp_path}/dags/airflow_dag.py')['protect_dag']; "
        "run = dag.test(); "
        "print('STATES', {t.task_id: str(t.state) for t in run.get_task_instances()})"
    )
    expected = {
        0: {"protect": "success", "publish": "success"},
        3: {"protect": "success", "publish": "success"},
        75: {"protect": "skipped", "publish": "skipped"},
        2: {"protect": "failed", "publish": "upstream_failed"},
    }
    for code, states in expected.items():
        (tmp_path / "code").write_text(str(code))
        (tmp_path / "called").unlink(missing_ok=True)
        ran = subprocess.run(
            [PYTHON, "-c", program], env=stand_in, capture_output=True, text=True, check=False
        )
        [line] = [line for line in ran.stdout.splitlines() if line.startswith("STATES")] or [ran]
        for task, state in states.items():
            assert f"'{task}': '{state}'" in str(line), (
                code,
                ran.stdout[-3000:],
                ran.stderr[-3000:],
            )
        check_calls(tmp_path, with_record=code in (0, 3))


@pytest.mark.slow
def test_dagster_materializes_or_fails_by_exit_code(tmp_path, stand_in):
    needs("dagster")
    program = (
        f"import runpy, dagster; made = runpy.run_path('{EXAMPLES}/dagster_definitions.py'); "
        "done = dagster.materialize([made['protected_photos']], raise_on_error=False); "
        "found = done.asset_materializations_for_node('protected_photos') if done.success else []; "
        "retried = [e for e in done.all_events if e.event_type_value == 'STEP_UP_FOR_RETRY']; "
        "print('DONE', done.success, len(retried), [m.metadata['run_id'].value for m in found])"
    )
    good, wrong = "True 0 ['c0ffee']", "False 0 []"
    for code, outcome in {0: good, 3: good, 75: good, 2: wrong}.items():
        (tmp_path / "code").write_text(str(code))
        (tmp_path / "called").unlink(missing_ok=True)
        ran = subprocess.run(
            [PYTHON, "-c", program], env=stand_in, capture_output=True, text=True, check=False
        )
        assert f"DONE {outcome}" in ran.stdout, (code, ran.stdout, ran.stderr[-3000:])
        check_calls(tmp_path, with_record=code != 2)


def test_argo_calls_commands_that_exist_and_retries_one_exit_code():
    workflow = yaml.safe_load((EXAMPLES / "argo.yaml").read_text("utf-8"))["spec"]
    templates = {t["name"]: t for t in workflow["workflowSpec"]["templates"]}
    for template in templates.values():
        if (container := template.get("container")) and container["command"] == ["one4all"]:
            parse(VERBS, container["args"])
    assert templates["protect"]["retryStrategy"]["expression"] == "asInt(lastRetry.exitCode) == 1"
    for steps in templates["hourly"]["steps"]:
        assert all(step["template"] in templates for step in steps)
    assert workflow["concurrencyPolicy"] == "Forbid"


def test_step_functions_lead_somewhere_and_call_what_exists():
    machine = json.loads((EXAMPLES / "step_functions.json").read_text("utf-8"))
    states = machine["States"]
    targets = {machine["StartAt"]}
    for state in states.values():
        choices = [*state.get("Choices", []), *state.get("Catch", []), state]
        targets |= {choice["Next"] for choice in choices if "Next" in choice}
        targets |= {state["Default"]} if "Default" in state else set()
        assert state["Type"] in ("Succeed", "Fail", "Choice") or "Next" in state or state["End"]
    assert targets == states.keys()
    task = states["Protect"]["Parameters"]
    program, *words = task["ContainerOverrides"]["Command"]
    assert program == "one4all"
    parse(VERBS, words)
    actions = {
        rule.get("OnExitCode"): rule["Action"] for rule in task["RetryStrategy"]["EvaluateOnExit"]
    }
    assert (actions["1"], actions["*"]) == ("RETRY", "EXIT")

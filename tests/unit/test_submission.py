"""What is sent to a cluster, under which name, and what is not.

On a real cluster: tests/integration/test_jobs.py.
"""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from types import SimpleNamespace

import pytest

from one4all.errors import UsageError
from pipelines import submit as submitting
from pipelines.cli.operating import VERBS_WITH_SETTINGS, default_settings
from pipelines.submit import Job, cluster_address, plan_job, refuse_secrets

PROTECT = ["protect", "s3://in", "s3://out"]
NOON = datetime(2026, 11, 1, 12, 34, tzinfo=UTC)


def test_slot_and_arguments_make_the_id():
    daily = plan_job(PROTECT, slot="daily", now=NOON).submission_id
    assert daily.startswith("protect-2026-11-01-")
    assert plan_job(PROTECT, slot="daily", now=NOON + timedelta(hours=11)).submission_id == daily
    assert plan_job(PROTECT, slot="daily", now=NOON + timedelta(hours=12)).submission_id != daily
    assert plan_job([*PROTECT, "--since=36h"], slot="daily", now=NOON).submission_id != daily
    joined = plan_job(["protect", "s3://in s3://out"], slot="daily", now=NOON)
    assert joined.submission_id != daily
    hourly = plan_job(PROTECT, slot="hourly", now=NOON).submission_id
    assert hourly.startswith("protect-2026-11-01T12-")
    elsewhere = NOON.astimezone(timezone(timedelta(hours=9)))  # slots are UTC everywhere
    assert plan_job(PROTECT, slot="hourly", now=elsewhere).submission_id == hourly


@pytest.mark.parametrize("package", ["pipelines", "one4all"])
def test_folder_that_would_shadow_the_installed_packages_is_refused(tmp_path, package):
    (tmp_path / "notes").mkdir()
    plan_job(PROTECT, working_dir=str(tmp_path))
    (tmp_path / package).mkdir()
    with pytest.raises(UsageError, match=f"holds a {package} of its own.*the installed one"):
        plan_job(PROTECT, working_dir=str(tmp_path))
    (tmp_path / package).rmdir()
    (tmp_path / f"{package}.py").touch()
    with pytest.raises(UsageError, match=f"holds a {package} of its own"):
        plan_job(PROTECT, working_dir=str(tmp_path))


def test_without_a_slot_every_submission_is_new():
    assert plan_job(PROTECT, now=NOON).submission_id != plan_job(PROTECT, now=NOON).submission_id


def test_entrypoint_is_quoted_and_nothing_else_is_sent(tmp_path):
    job = plan_job(["protect", "a b", "$(rm x)", "s3://out"], submission_id="one")
    assert job.entrypoint == "one4all protect 'a b' '$(rm x)' s3://out"
    assert job.runtime_env == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "30"}}
    uploaded = plan_job(PROTECT, submission_id="one", working_dir=str(tmp_path)).runtime_env
    assert uploaded["working_dir"] == str(tmp_path)
    assert {".env", ".aws", "*.pem"} <= set(uploaded["excludes"])
    assert uploaded.keys() == {"working_dir", "excludes", "env_vars"}


JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    "argument",
    [
        "AWS_SECRET_ACCESS_KEY=x",
        "ray.token=abcdef",
        "--set=hf_token: abcdef",
        "DB_PASS=x",
        "db.passwd=x",
        "PGPASSWORD=x",
        "dbPassword: x",
        "GITHUB_PAT=x",
        "SSH_PRIVATE_KEY=x",
        "api-key=x",
        "slack.credentials=x",
        "AKIA" + "A" * 16,
        "x=ASIA" + "B2" * 8,
        "hf_" + "a" * 20,
        "ghp_" + "a1" * 18,
        "github_pat_" + "a1" * 20,
        "glpat-" + "a1" * 10,
        "xoxb-123456789012-abcdef",
        "sk-" + "a1" * 24,
        "sk-proj-" + "a1" * 24,
        "sk-ant-api03-" + "a1" * 24,
        "sk_live_" + "a1" * 12,
        "AIza" + "a1" * 18,
        JWT,
        f"Authorization: Bearer {'a1' * 12}",
        "https://user:hunter2@host/x",
        "https://b.s3.amazonaws.com/k?X-Amz-Signature=00",
        "https://a.blob.core.windows.net/c?sv=1&sig=00",
        "AccountName=a;AccountKey=b",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "prefix/hunter2-hunter2",
        "of a database: correct horse",
    ],
)
def test_secrets_are_refused_and_not_repeated(argument):
    environment = {"STORE_PASSWORD": "hunter2-hunter2", "DB_PASS": "correct horse"}
    with pytest.raises(UsageError, match="argument 2 of the job looks like a secret") as refused:
        refuse_secrets(["protect", argument], environment)
    assert argument not in str(refused.value)
    assert not any(value in str(refused.value) for value in environment.values())


@pytest.mark.parametrize("option", ["--password", "--db-pass", "-token"])
def test_value_of_an_option_is_refused_too(option):
    with pytest.raises(UsageError, match=rf"argument 3 .*\(the value of {option}\)"):
        refuse_secrets(["protect", option, "hunter2"], {})


@pytest.mark.parametrize(
    "name",
    [
        "DB_PASS",
        "GITHUB_PAT",
        "SSH_PRIVATE_KEY",
        "OPENAI_KEY",
        "MYSQL_PWD",
        "PGPASSWORD",
        "npmToken",
    ],
)
def test_values_of_variables_that_are_named_like_secrets_are_refused(name):
    value = "hunter2/hunter2-hunter2"
    with pytest.raises(UsageError, match=rf"the value of \${name} on this machine"):
        refuse_secrets([f"s3://{value}/x"], {name: value})


def test_ordinary_arguments_are_no_secrets(tmp_path):
    (tmp_path / "key.json").touch()
    environment = {
        "RAY_AUTH_MODE": "disabled",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token",
        "GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "key.json"),
        "AWS_ACCESS_KEY_ID": "of-nobody",
        "PWD": "/srv/photos",
        "OLDPWD": "/srv/photos/in",
        "DB_PASSWORD": "short",
        "SORT_KEY": "modified-at",
    }
    arguments = [
        "s3://secrets-of-the-sea/in",
        "s3://sk-photos-2026-11-01-0123456789/task-force-1234567890",
        "/srv/photos/in/disk-1234567890abcdef1234",
        "max_tokens=5",
        "tokenizer=x",
        "/var/run/token",
        str(tmp_path / "key.json"),
        "compass=north",
        "patch_size=16",
        "sha256:" + "0a" * 32,
        "--since=2026-11-01T00:00Z",
        "disabled",
        "of-nobody/modified-at/short",
        "aws_secret_name=one4all",
    ]
    refuse_secrets(["protect", *arguments], environment)


@pytest.mark.parametrize("verb", VERBS_WITH_SETTINGS)
def test_no_setting_of_ours_is_taken_for_a_secret(verb):
    def assignments(settings: dict, prefix: str = "") -> Iterator[str]:
        for key, value in settings.items():
            if isinstance(value, dict):
                yield from assignments(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}={value or 'x'}"

    settings = default_settings(verb).model_dump(mode="json")
    refuse_secrets([verb, *(f"--set={text}" for text in assignments(settings))], {})


def test_option_beats_environment_and_a_cluster_address_is_no_jobs_api():
    environment = {"RAY_API_SERVER_ADDRESS": "http://api:8265/", "RAY_ADDRESS": "http://ray:8265"}
    assert cluster_address("https://me:1", environment) == "https://me:1"
    assert cluster_address(None, environment) == "http://api:8265"
    assert cluster_address(None, {"RAY_ADDRESS": "http://ray:8265"}) == "http://ray:8265"
    with pytest.raises(UsageError, match="give --address"):
        cluster_address(None, {"RAY_ADDRESS": "10.0.0.1:6379"})
    with pytest.raises(UsageError, match="dashboard"):
        cluster_address("10.0.0.1:6379", {})


@pytest.mark.parametrize("submission_id", ["../x", "a b", "x" * 129])
def test_ids_that_would_be_paths_are_refused(submission_id):
    with pytest.raises(UsageError, match="letters, digits"):
        plan_job(PROTECT, submission_id=submission_id)


class FakeClient:
    """A jobs API with one job; its log breaks off once, as a network does."""

    def __init__(self, code: int | None, *, status: str = "FAILED", breaks: int = 1) -> None:
        self.code, self.status, self.breaks, self.stopped = code, status, breaks, False
        self.log = "one\ntwo\nthree\nlast without newline"

    def submit_job(self, **request):
        raise RuntimeError("Request failed\nValueError: Job already exists.\n.")

    def get_job_info(self, name):
        ended = self.breaks < 0
        status = SimpleNamespace(
            value=self.status if ended else "RUNNING", is_terminal=lambda: ended
        )
        return SimpleNamespace(
            status=status, driver_exit_code=self.code, entrypoint="one4all protect", message="why"
        )

    async def tail_job_logs(self, name):
        self.breaks -= 1
        yield self.log[:6]
        if self.breaks == 0:
            raise RuntimeError("closed")
        yield self.log[6:]


@pytest.fixture
def follow(monkeypatch):
    monkeypatch.setattr(submitting, "_POLL_SECONDS", 0)

    def run(client, job=Job(("protect",), "slot")):  # noqa: B008
        lines: list[str] = []
        monkeypatch.setattr(submitting, "_connect", lambda address: client)
        return submitting.submit(job, "http://x", say=lines.append), lines

    return run


def test_used_slot_is_followed_through_a_break_without_repeating_a_line(follow):
    code, lines = follow(FakeClient(75))
    assert code == 75
    assert "submitted already" in lines[0]
    assert lines[1:5] == ["one", "two", "three", "last without newline"]


@pytest.mark.parametrize(
    ("status", "code", "exit_status"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 3, 3),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 130),
    ],
)
def test_exit_status_is_the_drivers(follow, status, code, exit_status):
    assert follow(FakeClient(code, status=status))[0] == exit_status


def test_id_of_another_job_is_refused(follow):
    with pytest.raises(UsageError, match="belongs to another job"):
        follow(FakeClient(0), Job(("verify",), "slot"))


@pytest.mark.parametrize(("error", "told"), [(KeyboardInterrupt(), False), (OSError("x"), True)])
def test_second_interrupt_leaves_no_stack_trace(caplog, error, told):
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(submitting._tell_unless_interrupted)
    loop.call_exception_handler(
        {"message": "Task exception was never retrieved", "exception": error}
    )
    loop.close()
    assert ("never retrieved" in caplog.text) == told

"""Run a verb as a job of a Ray cluster: submit once, follow the log, pass the exit status on.

A submission id names a job for the life of its cluster. One that is made of the schedule slot and
the arguments makes submitting idempotent: a second submission of a slot follows the first one.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import shlex
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from one4all.errors import One4AllError, UsageError
from pipelines.leaks import find_secret
from pipelines.ray_session import prepare_environment, set_variables

INTERRUPTED = 130
SECOND_CHANCE_SECONDS = 5.0  # in which another Ctrl-C stops the job
LOST_SECONDS = 300.0  # without an answer of the cluster, after which following ends
GRACE_SECONDS = 30  # that a job has between SIGTERM and SIGKILL
STOP_SECONDS = 60.0  # in which a job that is stopped should have ended
_POLL_SECONDS = 1.0

Slot = Literal["hourly", "daily"]
Say = Callable[[str], None]

_SLOT_FORMATS: dict[Slot, str] = {"hourly": "%Y-%m-%dT%H", "daily": "%Y-%m-%d"}
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")  # Ray makes file names of it
# Never part of an uploaded working directory.
_EXCLUDED = [".git", ".venv", "runs", ".env", ".env.*", ".aws", ".ssh", ".netrc", "*.pem", "*.key"]
_EXCLUDED += [".azure", ".gcloud", ".kube", ".docker", ".gnupg", ".pgpass", ".git-credentials"]
_EXCLUDED += ["id_rsa*", "id_ecdsa*", "id_ed25519*", "*.p12", "*.pfx", "*.jks", "*.kdbx"]


class ClusterError(One4AllError):
    """The cluster stopped answering; what became of the job is not known."""


@dataclass(frozen=True)
class Job:
    """A verb with its arguments, and the name under which a cluster runs it once."""

    arguments: tuple[str, ...]
    submission_id: str
    program: str = "one4all"
    working_dir: str = ""

    @property
    def entrypoint(self) -> str:
        return shlex.join([*shlex.split(self.program), *self.arguments])

    @property
    def runtime_env(self) -> dict[str, Any]:
        """The working directory, if any; no secret: credentials are those of the cluster's nodes.

        A job that is stopped has time to abort uploads and to give back workers: Ray grants 3 s.
        """
        environment: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_SECONDS)}}
        if self.working_dir:
            environment |= {"working_dir": self.working_dir, "excludes": _EXCLUDED}
        return environment


def plan_job(
    arguments: Sequence[str],
    *,
    submission_id: str | None = None,
    slot: Slot | None = None,
    working_dir: str | None = None,
    program: str = "one4all",
    now: datetime | None = None,
) -> Job:
    """Name a job, and refuse what must not leave this machine.

    Args:
        arguments: The verb and its arguments, as `one4all` takes them.
        submission_id: Name of the job; default: made of the slot, or new.
        slot: "hourly" or "daily": one job for each hour or day (UTC) and these arguments.
        working_dir: Folder to upload and run in; None means that the program is in the image.
        program: How the cluster's nodes start one4all.
        now: For the slot.

    Raises:
        UsageError: No such folder, or one whose packages would replace ours; an id that Ray cannot
            use; or a secret among the arguments.
    """
    if submission_id and slot:
        raise UsageError("give --submission-id or --slot, not both")
    if submission_id and not _ID.fullmatch(submission_id):
        raise UsageError(
            f"submission id {submission_id!r}: letters, digits, '.', '_' and '-' only, at most 128"
        )
    refuse_secrets([*arguments, program], os.environ)
    if working_dir is not None:
        _check_folder(Path(working_dir))
    if not submission_id:
        digest = hashlib.sha256("\0".join(arguments).encode()).hexdigest()[:8]
        when = (now or datetime.now(UTC)).astimezone(UTC)
        stamp = when.strftime(_SLOT_FORMATS[slot] if slot else "%Y-%m-%dT%H%M%S")
        submission_id = f"{arguments[0] if arguments else 'job'}-{stamp}-{digest}"
        if slot is None:
            submission_id += f"-{uuid.uuid4().hex[:4]}"
    folder = str(Path(working_dir).resolve()) if working_dir else ""
    return Job(tuple(arguments), submission_id, program, folder)


def _check_folder(working_dir: Path) -> None:
    """Refuse a folder that cannot be uploaded, or whose content would be imported for ours.

    A job runs in the folder, where Python looks for modules before it looks among the installed.
    """
    if not working_dir.is_dir():
        raise UsageError(f"no such folder to upload: {working_dir}")
    for package in ("one4all", "pipelines"):
        if any((working_dir / name).exists() for name in (package, f"{package}.py")):
            raise UsageError(
                f"{working_dir} holds a {package} of its own, which would run on the cluster in "
                "place of the installed one; give a folder that has the job's files alone, such "
                "as configs"
            )


def refuse_secrets(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Raise UsageError for an argument that looks like a secret, or is one of this machine.

    Whoever can see the cluster's dashboard can read the entry point of a job.
    """
    if found := find_secret(arguments, environment):
        position, kind = found
        raise UsageError(
            f"argument {position} of the job looks like a secret ({kind}), and every user of the "
            "cluster could read it; give the nodes a role, or mount the secret there"
        )


def cluster_address(address: str | None, environment: Mapping[str, str]) -> str:
    """The jobs API to talk to: the option, or the environment, where that names one."""
    for candidate in (
        address,
        environment.get("RAY_API_SERVER_ADDRESS"),
        environment.get("RAY_ADDRESS"),
    ):
        if candidate and candidate.startswith(("http://", "https://")):
            return candidate.rstrip("/")
        if candidate and candidate is address:
            raise UsageError(f"address {address!r} must be that of the dashboard, http://HEAD:8265")
    raise UsageError(
        "no cluster to submit to: give --address http://HEAD:8265 or set RAY_API_SERVER_ADDRESS"
    )


def submit(job: Job, address: str, *, say: Say, stop_on_interrupt: bool = False) -> int:
    """Submit a job unless it was submitted already; follow it to its end.

    Args:
        job: See `plan_job`. Without arguments the job must exist, and is followed.
        address: http(s) address of the jobs API.
        say: Receives each line of the job's log, and ours.
        stop_on_interrupt: Let KeyboardInterrupt stop the job, and not only the following.

    Returns:
        The job's exit status; 128 and the signal if a signal ended it, 130 if it was stopped or no
        longer followed, 1 if its driver never ran or was lost.

    Raises:
        UsageError: The cluster cannot be reached, the id belongs to another job, or no such job.
        ClusterError: The cluster stopped answering.
    """
    client = _connect(address)
    follower = _Follower(client, job.submission_id, say)
    if not job.arguments:
        if follower.look() is None:
            raise UsageError(f"no job {job.submission_id} on {address}")
    elif _submit_once(client, job):
        say(f"submitted {job.submission_id} to {address}")
    else:
        say(f"{job.submission_id} was submitted already; following it")
    try:
        return follower.follow()
    except KeyboardInterrupt:
        if stop_on_interrupt or _interrupted_again(job.submission_id, address, say):
            follower.stop()
        return INTERRUPTED


def _interrupted_again(submission_id: str, address: str, say: Say) -> bool:
    try:  # from the first line on: the second Ctrl-C may come at once
        say(f"no longer following {submission_id}, which goes on; to follow it again:")
        say(f"    one4all submit --address {address} --submission-id {submission_id}")
        say(f"another Ctrl-C within {SECOND_CHANCE_SECONDS:.0f} s stops the job")
        time.sleep(SECOND_CHANCE_SECONDS)
    except KeyboardInterrupt:
        return True
    return False


def _connect(address: str) -> Any:
    """A client of the jobs API at this address, whatever RAY_ADDRESS says."""
    prepare_environment()
    try:
        import aiohttp  # noqa: F401
        import requests  # noqa: F401
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise UsageError(
            "one4all submit needs Ray's jobs client: pip install 'one4all[cluster]'"
        ) from error
    for name in list(logging.root.manager.loggerDict):
        if name == "ray" or name.startswith("ray."):  # which set their own levels
            logging.getLogger(name).setLevel(logging.ERROR)
    with set_variables({"RAY_API_SERVER_ADDRESS": address}):
        try:
            return JobSubmissionClient(address)
        except AuthenticationError as error:
            raise UsageError(
                f"cannot submit to {address}: {str(error).splitlines()[0].rstrip('.')}; set "
                "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's token"
            ) from error
        except (ConnectionError, RuntimeError, OSError) as error:
            raise UsageError(
                f"cannot submit to {address}: {_last_line(error)}; is this the dashboard's "
                "address, and RAY_AUTH_MODE that of the cluster?"
            ) from error


def _submit_once(client: Any, job: Job) -> bool:
    """Submit; False if a job of this id, which must be the same, exists already."""
    try:
        client.submit_job(
            entrypoint=job.entrypoint,
            submission_id=job.submission_id,
            runtime_env=job.runtime_env,
        )
        return True
    except (RuntimeError, OSError, ValueError) as error:
        try:
            standing = client.get_job_info(job.submission_id)
        except (RuntimeError, OSError):
            raise UsageError(f"the cluster refused the job: {_last_line(error)}") from error
    if standing.entrypoint != job.entrypoint:
        raise UsageError(
            f"submission id {job.submission_id} belongs to another job of this cluster: "
            f"{standing.entrypoint}"
        )
    return False


class _Follower:
    """Follows one job, through breaks of the connection."""

    def __init__(self, client: Any, submission_id: str, say: Say) -> None:
        self._client, self._id, self._say = client, submission_id, say
        self._num_seen = 0  # characters of the log
        self._line = ""  # that has not ended yet

    def look(self) -> Any:
        """The job as the cluster sees it; None if it is unknown."""
        try:
            return self._client.get_job_info(self._id)
        except RuntimeError as error:
            if "does not exist" in str(error):
                return None
            raise

    def follow(self) -> int:
        """Say the log line by line until the job has ended; its exit status."""
        while True:
            # Asked before the log is read: of a job that has ended, the log is then complete.
            job = self._insist()
            problem = asyncio.run(self._read_log())
            if problem and job.status.is_terminal():  # the node that holds the log is gone
                self._say(f"the log of {self._id} cannot be read: {_last_line(problem)}")
            if job.status.is_terminal():
                return self._outcome(job)
            time.sleep(_POLL_SECONDS)

    def _insist(self) -> Any:
        """The job; asks again while the cluster does not answer."""
        deadline = time.monotonic() + LOST_SECONDS
        while True:
            try:
                job = self.look()
                break
            except (RuntimeError, OSError) as error:
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"the cluster has not answered for {LOST_SECONDS:.0f} s, and what became "
                        f"of {self._id} is not known: {_last_line(error)}"
                    ) from error
                time.sleep(_POLL_SECONDS)
        if job is None:
            raise ClusterError(
                f"the cluster no longer knows {self._id}, so its head was replaced; what the job "
                "had done is done: submit it again"
            )
        return job

    def stop(self) -> None:
        """Stop the job and wait until it has ended."""
        self._say(f"stopping {self._id}")
        try:
            self._client.stop_job(self._id)
        except (RuntimeError, OSError) as error:
            raise ClusterError(f"{self._id} was not stopped: {_last_line(error)}") from error
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline:
            if self._insist().status.is_terminal():
                self._say(f"{self._id} has ended")
                return
            time.sleep(_POLL_SECONDS)
        self._say(f"{self._id} has not ended yet")

    async def _read_log(self) -> Exception | None:
        """Say what is new in the log, until the job ends; or what broke the connection."""
        asyncio.get_running_loop().set_exception_handler(_tell_unless_interrupted)
        position = 0
        chunks: AsyncIterator[str] = self._client.tail_job_logs(self._id)
        while True:
            try:
                # A connection may die without a word; one to a quiet job is made anew.
                chunk = await asyncio.wait_for(anext(chunks), LOST_SECONDS)
            except StopAsyncIteration:
                return None
            except Exception as error:  # what became of the job is asked elsewhere
                return error
            new = chunk[max(0, self._num_seen - position) :]
            position += len(chunk)
            self._num_seen = max(self._num_seen, position)
            *whole, self._line = (self._line + new).split("\n")
            for line in whole:
                self._say(line)

    def _outcome(self, job: Any) -> int:
        if self._line:
            self._say(self._line)
            self._line = ""
        status = str(job.status.value)
        code = job.driver_exit_code
        if status == "SUCCEEDED":
            return 0
        if status == "STOPPED":
            self._say(f"{self._id} was stopped")
            return INTERRUPTED
        if code is None:  # it never ran, or its node is gone
            self._say(f"{self._id} failed without an exit status: {job.message}")
            return 1
        self._say(f"{self._id} ended with exit status {code}")
        return int(code) if code > 0 else 128 - int(code)


def _tell_unless_interrupted(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A second Ctrl-C ends a task in the middle; nobody waits for it, and nobody has to be told."""
    if not isinstance(context.get("exception"), KeyboardInterrupt):
        loop.default_exception_handler(context)


def _last_line(error: Exception) -> str:
    """What an error of the jobs API says, without the traceback that it carries along."""
    lines = [line for line in str(error).splitlines() if line.strip(" .")]
    return lines[-1].strip() if lines else type(error).__name__

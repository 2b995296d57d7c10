"""Submitting a job to a Ray cluster: the code and the job travel as a small working directory."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import shutdown
from orchestrator.config.schema import JobSpec
from orchestrator.errors import ClusterError
from orchestrator.submit import working_dir
from orchestrator.submit.dashboard_address import dashboard_address, refused
from orchestrator.submit.job_log import FAILURES, JobLog
from orchestrator.submit.remote_planning import require_fit
from orchestrator.train.environment import HANDOVER

_INTERRUPTED, _TERMINATED = 130, 143
_SECONDS_TO_STOP = 120  # between the signal that stops a job and the one that kills it; Ray gives 3
_SECONDS_TO_END = 30


@dataclass(frozen=True)
class Head:
    """Where jobs are submitted.

    Attributes:
        address: Dashboard of the cluster, http://HEAD:8265 or https://HEAD.
        certificate: File of the authority that signed the dashboard's certificate; None takes the system's.
    """

    address: str
    certificate: Path | None = None


@dataclass(frozen=True)
class Submission:
    """How a job is submitted.

    Attributes:
        wait: Whether to stream the log until the run ends.
        look_first: Whether every node is looked at before the training starts, as `orchestrator doctor` does.
        force: Whether it is trained although the plan says that it cannot fit.
        inherit: Whether the variables that are passed on by default are sent as they are set here.
    """

    wait: bool = True
    look_first: bool = True
    force: bool = False
    inherit: bool = True


def submit(
    job: JobSpec,
    head: Head,
    how: Submission,
    tell: tuple[Callable[[str], None], Callable[[str], None]],
) -> int:
    """Plan a job for a cluster, submit it and follow it.

    Args:
        job: The job. Data with a relative path travel along; others must lie where nodes see them.
        head: The cluster.
        how: What is done before and after.
        tell: Called with each line of what the cluster says, and with what is found before that.

    Returns:
        Exit code of the run; 0 at once where nothing waits for it.

    Raises:
        ClusterError: The cluster cannot be reached, does not let this user in, or the job cannot fit on it.
        SpecError: Something that the job names does not travel.
    """
    say, note = tell
    address = dashboard_address(head.address)
    values = working_dir.variables(job, how.inherit)
    with tempfile.TemporaryDirectory(prefix="orchestrator-submit-") as folder:
        working_dir.pack(job, Path(folder), note)
        if values:
            note(f"variables that travel: {', '.join(sorted(values))}")
        try:
            client = _client(address, head.certificate)
            # The client's own way to ask, so that its token and certificate are used.
            require_fit(job, lambda path: client._do_request("GET", path).json(), how.force, note)
            identity = _submit(client, job, how, folder, values)
        except FAILURES as error:
            raise refused(address, error) from None
    say(f"submitted {identity}")
    for what, words in (("follow", "logs --follow"), ("look", "status"), ("end", "stop")):
        say(f"{what.ljust(6)} ray job {words} --address {address} {identity}")
    return _follow(client, identity, address, say) if how.wait else 0


def _client(address: str, certificate: Path | None) -> Any:
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(address, verify=str(certificate or "") or True)


def _submit(client: Any, job: JobSpec, how: Submission, folder: str, values: Mapping[str, str]) -> str:
    """Submit a job, and return its id."""
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(_stop_seconds(job))}
    if values:
        variables[HANDOVER] = _hand_over(client, values)
    identity: str = client.submit_job(
        entrypoint=entrypoint(job, how.look_first, how.force),
        submission_id=f"{job.name}-{uuid.uuid4().hex[:8]}",
        runtime_env={"working_dir": folder, "env_vars": variables},
        metadata={"orchestrator_run": job.name},
    )
    return identity


def _hand_over(client: Any, values: Mapping[str, str]) -> str:
    """Put variables into the memory of the cluster's GCS, and return the key that `train` finds them by.

    Of Ray's API this is the way for packages, which no node unpacks unless a job's runtime environment names
    them. `env_vars` would show the values in job records, logs and command lines.
    """
    name = f"_ray_pkg_{uuid.uuid4().hex}.zip"
    # An error of Ray's quotes the first bytes of a package.
    content = b" " * 64 + json.dumps(dict(values)).encode()
    answer = client._do_request("PUT", f"/api/packages/gcs/{name}", data=content)
    if answer.status_code != 200:
        raise RuntimeError(f"variables cannot be sent, HTTP {answer.status_code}")
    return f"gcs://{name}"


def entrypoint(job: JobSpec, look_first: bool, force: bool = False) -> str:
    """Return the command that runs on the head, in the working directory that travelled there."""
    train = "python -m orchestrator train job.yaml --address auto" + (" --force" if force else "")
    if not look_first:
        return train
    storage = shlex.quote(job.checkpoint.storage)
    return f"python -m orchestrator doctor --address auto --storage {storage} && {train}"


def _stop_seconds(job: JobSpec) -> int:
    """Return the seconds between the signal that stops a job and the one that kills it."""
    return max(_SECONDS_TO_STOP, job.run.stop_grace_seconds + _SECONDS_TO_END)


def _pack_working_dir(job: JobSpec, folder: Path) -> None:
    """Put all that travels but variables into a folder, and say nothing."""
    working_dir.pack(job, folder, lambda text: None)


def _follow(client: Any, identity: str, address: str, say: Callable[[str], None]) -> int:
    """Print the log as it grows, and return the exit code of the run; Ctrl-C asks once whether to end it."""
    log, stopped = JobLog(client, identity, say), False
    while True:
        try:
            details = log.follow()
            break
        except KeyboardInterrupt:
            if stopped or shutdown.received() or not _wants_to_stop(identity):
                raise
            client.stop_job(identity)
            stopped = True
            say(f"{identity} is told to stop and saves its step; submitted again, it resumes")
        except FAILURES as error:
            raise ClusterError(
                f"lost the cluster while following {identity} ({' '.join(str(error).split())[:200]}); the "
                f"run may go on: ray job logs --follow --address {address} {identity}, or submit the same "
                "job again to resume it"
            ) from None
    if details.status == "SUCCEEDED":
        return 0
    if details.status == "STOPPED":
        return _INTERRUPTED if stopped else _TERMINATED
    if not details.driver_exit_code:
        raise ClusterError(
            f"{identity} ended before its command did ({_reason(details.message)}); see `ray job status "
            f"--address {address} {identity}`, and submit it again once the cluster can run it"
        )
    return int(details.driver_exit_code)


def _reason(message: str | None) -> str:
    return " ".join((message or "no reason is given").split())[:300]


def _wants_to_stop(identity: str) -> bool:
    """Ask a person whether the job is to end as well; nobody there means no, and so does another Ctrl-C."""
    if not sys.stdin.isatty():
        return False
    sys.stderr.write(f"\nend {identity} as well? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")

"""Submits a job to a Ray cluster; package, job file and small data are uploaded as working directory."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator import shutdown
from orchestrator.config.schema import JobSpec
from orchestrator.errors import ClusterError
from orchestrator.submit import working_dir
from orchestrator.submit.dashboard_address import dashboard_address, submission_error
from orchestrator.submit.job_log import FAILURES, JobClient, JobLog
from orchestrator.submit.remote_planning import require_fit
from orchestrator.train.environment import SUBMITTED_ENV_KEY

_logger = logging.getLogger(__name__)

_INTERRUPTED, _TERMINATED = 130, 143
_SECONDS_TO_STOP = 120  # between SIGTERM and SIGKILL of a stopped job; Ray's default is 3
_SECONDS_TO_END = 30


@dataclass(frozen=True)
class Head:
    """Dashboard of a Ray cluster.

    Attributes:
        address: URL of the dashboard, http://HEAD:8265 or https://HEAD.
        certificate: CA certificate file for the dashboard; None uses the system's certificates.
    """

    address: str
    certificate: Path | None = None


@dataclass(frozen=True)
class Submission:
    """Options of a submission.

    Attributes:
        wait: Stream the log until the run ends.
        run_doctor: Run `orchestrator doctor` on the cluster before training.
        force: Train even if the plan predicts that the job does not fit.
        inherit_env: Send the environment variables that are forwarded by default.
    """

    wait: bool = True
    run_doctor: bool = True
    force: bool = False
    inherit_env: bool = True


def submit(
    job: JobSpec,
    head: Head,
    options: Submission,
    print_line: Callable[[str], None],
) -> int:
    """Plan a job for a cluster, submit it and follow its log.

    Args:
        job: The job. Data files with a relative path are uploaded; others must be visible to the nodes.
        head: Dashboard of the cluster.
        options: Options of the submission.
        print_line: Called with each line of output.

    Returns:
        Exit code of the run; 0 immediately with wait=False.

    Raises:
        ClusterError: The cluster cannot be reached, denies access, or the job does not fit on it.
        SpecError: A path of the job is neither uploaded nor visible to the cluster.
    """
    address = dashboard_address(head.address)
    values = working_dir.env_to_send(job, options.inherit_env)
    with tempfile.TemporaryDirectory(prefix="orchestrator-submit-") as folder:
        working_dir.create_working_dir(job, Path(folder))
        if values:
            _logger.info(f"environment variables sent: {', '.join(sorted(values))}")
        try:
            client = _client(address, head.certificate)
            # Through the client, so that its token and certificate are used.
            require_fit(job, lambda path: client._do_request("GET", path).json(), options.force)
            submission_id = _submit(client, job, options, folder, values)
        except FAILURES as error:
            raise submission_error(address, error) from None
    print_line(f"submitted {submission_id}")
    for purpose, command in (("follow", "logs --follow"), ("status", "status"), ("stop", "stop")):
        print_line(f"{purpose.ljust(6)} ray job {command} --address {address} {submission_id}")
    return _follow(client, submission_id, address, print_line) if options.wait else 0


def _client(address: str, certificate: Path | None) -> JobClient:
    from ray.job_submission import JobSubmissionClient

    client: JobClient = JobSubmissionClient(address, verify=str(certificate or "") or True)
    return client


def _submit(
    client: JobClient, job: JobSpec, options: Submission, folder: str, values: Mapping[str, str]
) -> str:
    """Submit a job and return its submission ID."""
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(_stop_seconds(job))}
    if values:
        variables[SUBMITTED_ENV_KEY] = _hand_over(client, values)
    submission_id: str = client.submit_job(
        entrypoint=entrypoint(job, options.run_doctor, options.force),
        submission_id=f"{job.name}-{uuid.uuid4().hex[:8]}",
        runtime_env={"working_dir": folder, "env_vars": variables},
        metadata={"orchestrator_run": job.name},
    )
    return submission_id


def _hand_over(client: JobClient, values: Mapping[str, str]) -> str:
    """Store environment variables in the memory of the GCS and return their key for `train`.

    Uses Ray's API for packages; no node unpacks a package that is not in a runtime environment. `env_vars`
    would expose the values in job records, logs and command lines.
    """
    name = f"_ray_pkg_{uuid.uuid4().hex}.zip"
    # Ray quotes the first bytes of a package in an error message, so pad them.
    content = b" " * 64 + json.dumps(dict(values)).encode()
    response = client._do_request("PUT", f"/api/packages/gcs/{name}", data=content)
    if response.status_code != 200:
        raise RuntimeError(f"environment variables could not be sent, HTTP {response.status_code}")
    return f"gcs://{name}"


def entrypoint(job: JobSpec, run_doctor: bool, force: bool = False) -> str:
    """Return the command that Ray runs on the head in the uploaded working directory."""
    train = "python -m orchestrator train job.yaml --address auto" + (" --force" if force else "")
    if not run_doctor:
        return train
    storage = shlex.quote(job.checkpoint.storage)
    return f"python -m orchestrator doctor --address auto --storage {storage} && {train}"


def _stop_seconds(job: JobSpec) -> int:
    """Return the seconds between SIGTERM and SIGKILL of a stopped job."""
    return max(_SECONDS_TO_STOP, job.run.stop_grace_seconds + _SECONDS_TO_END)


def _follow(client: JobClient, submission_id: str, address: str, print_line: Callable[[str], None]) -> int:
    """Print the log and return the exit code of the run; Ctrl-C asks once whether to stop the job."""
    log, stopped = JobLog(client, submission_id, print_line), False
    while True:
        try:
            details = log.follow()
            break
        except KeyboardInterrupt:
            if stopped or shutdown.received() or not _wants_to_stop(submission_id):
                raise
            client.stop_job(submission_id)
            stopped = True
            print_line(
                f"stopping {submission_id}; it saves a checkpoint, and submitting the job again resumes it"
            )
        except FAILURES as error:
            raise ClusterError(
                f"lost the cluster while following {submission_id} ({' '.join(str(error).split())[:200]}); "
                f"the run may still be active: ray job logs --follow --address {address} {submission_id}, or "
                "submit the same job again to resume it"
            ) from None
    status: object = details.status  # a str enumeration
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        return _INTERRUPTED if stopped else _TERMINATED
    if not details.driver_exit_code:
        raise ClusterError(
            f"{submission_id} failed before its command started ({_reason(details.message)}); see `ray job "
            f"status --address {address} {submission_id}`, and submit the job again when the cluster can run "
            "it"
        )
    return int(details.driver_exit_code)


def _reason(message: str | None) -> str:
    return " ".join((message or "no reason given").split())[:300]


def _wants_to_stop(submission_id: str) -> bool:
    """Ask on the terminal whether to stop the job; without a terminal, or on another Ctrl-C, no."""
    if not sys.stdin.isatty():
        return False
    sys.stderr.write(f"\nstop {submission_id} as well? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")

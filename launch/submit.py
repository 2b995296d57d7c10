"""Submitting a job to a Ray cluster: the code and the job travel as a small working directory."""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError

from launch.remote import require_fit
from orchestrator import jobfile
from orchestrator.errors import ClusterError, SpecError
from orchestrator.spec import JobSpec

_PACKAGES = ("orchestrator", "cluster", "launch", "ds_configs")
_LARGEST_DATA_BYTES = 64 * 2**20
_POLL_SECONDS = 1.0
_INTERRUPTED = 130
_FAILURES = (ConnectionError, RuntimeError, ValueError, OSError, AuthenticationError)


@dataclass(frozen=True)
class Head:
    """Where jobs are submitted.

    Attributes:
        address: Dashboard of the cluster, http://HEAD:8265 or https://HEAD.
        certificate: File of the authority that signed the dashboard's certificate; None takes the system's.
    """

    address: str
    certificate: Path | None = None


def submit(
    job: JobSpec,
    head: Head,
    wait: bool,
    look_first: bool,
    tell: tuple[Callable[[str], None], Callable[[str], None]],
    force: bool = False,
) -> int:
    """Plan a job for a cluster, submit it and follow it.

    Args:
        job: The job. Data files with a relative path travel along; others must lie where nodes see them.
        head: The cluster.
        wait: Whether to stream the log until the run ends.
        look_first: Whether every node is looked at before the training starts, as `orchestrator doctor` does.
        tell: Called with each line of what the cluster says, and with what is predicted before that.
        force: Whether it is trained although the plan says that it cannot fit.

    Returns:
        Exit code of the run; 0 at once where nothing waits for it.

    Raises:
        ClusterError: The cluster cannot be reached, does not let this user in, or the job cannot fit on it.
        SpecError: Something that the job names does not travel.
    """
    from ray.job_submission import JobSubmissionClient

    say, note = tell
    with tempfile.TemporaryDirectory(prefix="orchestrator-submit-") as folder:
        _pack_working_dir(job, Path(folder))
        try:
            client = JobSubmissionClient(head.address, verify=str(head.certificate or "") or True)
            # The client's own way to ask, so that its token and certificate are used.
            require_fit(job, lambda path: client._do_request("GET", path).json(), force, note)
            identity = client.submit_job(
                entrypoint=entrypoint(job, look_first, force),
                submission_id=f"{job.name}-{uuid.uuid4().hex[:8]}",
                runtime_env={"working_dir": folder},
                metadata={"orchestrator_run": job.name},
            )
        except _FAILURES as error:
            raise _refused(head.address, error) from None
    say(f"submitted {identity}")
    for what, words in (("follow", "logs --follow"), ("look", "status"), ("end", "stop")):
        say(f"{what.ljust(6)} ray job {words} --address {head.address} {identity}")
    return _follow(client, identity, head.address, say) if wait else 0


def entrypoint(job: JobSpec, look_first: bool, force: bool = False) -> str:
    """Return the command that runs on the head, in the working directory that travelled there."""
    train = "python -m launch.cli train job.yaml --address auto" + (" --force" if force else "")
    if not look_first:
        return train
    storage = shlex.quote(job.checkpoint.storage)
    return f"python -m launch.cli doctor --address auto --storage {storage} && {train}"


def _refused(address: str, error: Exception) -> ClusterError:
    """Say why the dashboard does not take a job, and what to set."""
    reason = " ".join(str(error).split())[:200]
    if "Authentication" in reason:
        return ClusterError(
            f"the Ray dashboard at {address} asks for a token, and "
            + ("has none" if "Authentication required" in reason else "does not know the one that it has")
            + "; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to the file that holds it"
        )
    if "CERTIFICATE" in reason.upper():
        return ClusterError(
            f"the certificate of the Ray dashboard at {address} is not trusted ({reason}); name the "
            "authority's certificate with --certificate"
        )
    return ClusterError(
        f"the Ray dashboard at {address} does not take the job ({reason}); check --address and that the head "
        "is up"
    )


def _pack_working_dir(job: JobSpec, folder: Path) -> None:
    """Put the packages, the job file and data files with a relative path into a folder."""
    for name in _PACKAGES:
        source = Path(str(resources.files(name)))
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    (folder / "job.yaml").write_text(jobfile.dump(job), encoding="utf-8")
    sources = [*job.data.train, *(job.eval.data if job.eval else ())]
    problems = []
    for path in {source.path for source in sources if not source.path.startswith(("builtin/", "/", "~"))}:
        file = Path(path)
        if ".." in file.parts:
            problems.append(f"data path {path} leaves the working directory; use an absolute path")
        elif file.is_file() and file.stat().st_size > _LARGEST_DATA_BYTES:
            problems.append(f"data file {path} has more than 64 MiB; put it where every node sees it")
        elif file.is_file():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, folder / file)
    for field, place in (("model.path", job.model.path), ("method.adapter", job.method.adapter)):
        if place and not place.startswith(("builtin/", "/", "~")) and Path(place).exists():
            problems.append(
                f"{field}={place} is a folder of this machine, and models do not travel; use the absolute "
                "path of storage that every node sees"
            )
    if not Path(job.checkpoint.storage).is_absolute():
        problems.append(
            f"checkpoint.storage={job.checkpoint.storage} is relative, and on a cluster it would lie in "
            "a temporary folder; use the absolute path of storage that every node sees"
        )
    if problems:
        raise SpecError(*problems)


def _follow(client: Any, identity: str, address: str, say: Callable[[str], None]) -> int:
    """Print the log as it grows, and return the exit code of the run; Ctrl-C asks once whether to end it."""
    shown = 0
    while True:
        try:
            details = client.get_job_info(identity)
            log = client.get_job_logs(identity)
            fresh = log[shown:]
            if fresh:
                say(fresh.rstrip("\n"))
                shown = len(log)
            if details.status.is_terminal():
                break
            time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            if not _wants_to_stop(identity):
                raise
            client.stop_job(identity)
            say(f"{identity} is told to stop; it saves nothing more, and goes on when it is submitted again")
        except _FAILURES as error:
            raise ClusterError(
                f"lost the cluster while following {identity} ({' '.join(str(error).split())[:200]}); the "
                f"run may go on: ray job logs --follow --address {address} {identity}, or submit the same "
                "job again to resume it"
            ) from None
    if details.status == "SUCCEEDED":
        return 0
    if details.status == "STOPPED":
        return _INTERRUPTED
    code = details.driver_exit_code
    return code if code else ClusterError.exit_code


def _wants_to_stop(identity: str) -> bool:
    """Ask a person whether the job is to end as well; nobody there means no, and so does another Ctrl-C."""
    if not sys.stdin.isatty():
        return False
    sys.stderr.write(f"\nend {identity} as well? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")

"""Submitting a job to a Ray cluster: the code and the job travel as a small working directory."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from orchestrator import jobfile
from orchestrator.errors import ClusterError, SpecError
from orchestrator.spec import JobSpec
from orchestrator.train.session import choose_auth_mode

_PACKAGES = ("orchestrator", "cluster", "launch", "ds_configs")
_LARGEST_DATA_BYTES = 64 * 2**20
_POLL_SECONDS = 1.0


def submit(job: JobSpec, address: str, wait: bool, say: Callable[[str], None]) -> int:
    """Submit a job and follow it.

    Args:
        job: The job. Data files with a relative path travel along; others must lie where nodes see them.
        address: Dashboard of the cluster, http://HEAD:8265.
        wait: Whether to stream the log until the run ends.
        say: Called with each line for the user.

    Returns:
        Exit code of the run; 0 at once where nothing waits for it.

    Raises:
        ClusterError: The cluster cannot be reached.
        SpecError: A data file is too large to travel.
    """
    choose_auth_mode()
    from ray.job_submission import JobSubmissionClient

    with tempfile.TemporaryDirectory(prefix="orchestrator-submit-") as folder:
        _pack_working_dir(job, Path(folder))
        try:
            client = JobSubmissionClient(address)
            identity = client.submit_job(
                entrypoint="python -m launch.cli train job.yaml --address auto",
                runtime_env={"working_dir": folder},
                metadata={"orchestrator_run": job.name},
            )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ClusterError(
                f"the Ray dashboard at {address} does not take the job ({reason}); check --address and that "
                "the head is up"
            ) from None
    say(f"submitted {identity}; follow it with: ray job logs --address {address} --follow {identity}")
    return _follow(client, identity, say) if wait else 0


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


def _follow(client: Any, identity: str, say: Callable[[str], None]) -> int:
    """Print the log as it grows, and return the exit code of the run."""
    shown = 0
    while True:
        try:
            details = client.get_job_info(identity)
            log = client.get_job_logs(identity)
        except (ConnectionError, RuntimeError, OSError) as error:
            raise ClusterError(
                f"lost the cluster while following {identity} ({' '.join(str(error).split())[:200]}); the "
                "run may go on: submit the same job again to resume it"
            ) from None
        fresh = log[shown:]
        if fresh:
            say(fresh.rstrip("\n"))
            shown = len(log)
        if details.status.is_terminal():
            break
        time.sleep(_POLL_SECONDS)
    if details.status == "SUCCEEDED":
        return 0
    code = details.driver_exit_code
    return code if code else ClusterError.exit_code

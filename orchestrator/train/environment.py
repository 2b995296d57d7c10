"""Passes environment variables from the command to the driver, its Ray tasks and its workers.

The values may be secrets, so they are only kept in memory: in `os.environ` of the processes that need them
and, while the job runs, in the function table of Ray's GCS. Ray's `env_vars` would write them into logs, job
records and the command lines of workers. docs/environment.md documents the behavior for users.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping

from orchestrator.config.schema import JobSpec
from orchestrator.errors import ClusterError, SpecError
from orchestrator.package_data import PACKAGE

SUBMITTED_ENV_KEY = "ORCHESTRATOR_ENVIRONMENT"
"""Environment variable with the GCS key of the variables sent by `submit`; the key itself is not secret."""
_PREFIXES = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_", "WANDB_", "MLFLOW_", "NCCL_", "TORCH_NCCL_", "GLOO_")
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")


def is_forwarded(name: str) -> bool:
    """Return whether a variable is forwarded by default."""
    return name.startswith(_PREFIXES) or name.lower() in _PROXIES


def forwarded_env(environ: Mapping[str, str], names: Iterable[str] = ()) -> dict[str, str]:
    """Return the variables that are forwarded.

    Args:
        environ: Environment to select from.
        names: Names to forward in addition to the default ones, as in `run.env`.
    """
    names = set(names)
    return {name: value for name, value in environ.items() if name in names or is_forwarded(name)}


def resolve_env(job: JobSpec, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of `run.env`, with null replaced by the value in `environ`.

    Raises:
        SpecError: With every variable that is null in the job and not in `environ`.
    """
    values, unset = {}, []
    for name, value in job.run.env.items():
        if value is not None:
            values[name] = value.get_secret_value()
        elif name in environ:
            values[name] = environ[name]
        else:
            unset.append(name)
    if unset:
        raise SpecError(
            *(
                f"run.env.{name} is null, which uses the value from the environment of the command, but "
                f"{name} is not set; export it, or remove it from run.env"
                for name in unset
            )
        )
    return values


def apply_submitted_and_job_env(job: JobSpec) -> JobSpec:
    """Apply the variables sent by `submit`, if any, and then those of the job; see `apply_job_env`."""
    apply_submitted_env(last=True)
    return apply_job_env(job)


def apply_job_env(job: JobSpec) -> JobSpec:
    """Set the variables of `run.env` in this process, so that its child processes inherit them.

    Call it before importing libraries that read the environment at import.

    Returns:
        The job without values, so that everything recorded, sent or printed contains only names.

    Raises:
        SpecError: With every variable that is null in the job and not set.
    """
    os.environ.update(resolve_env(job, os.environ))
    return without_env_values(job)


def without_env_values(job: JobSpec) -> JobSpec:
    """Return the job with all values of `run.env` replaced by null."""
    run = job.run.model_copy(update={"env": dict.fromkeys(job.run.env)})
    return job.model_copy(update={"run": run})


def worker_setup_hook(values: Mapping[str, str]) -> Callable[[], None]:
    """Return Ray's `worker_process_setup_hook`: sets the variables and imports this package.

    Afterwards Ray puts the driver's working directory first on `sys.path`, where an `orchestrator` package of
    another project would shadow this one.

    Args:
        values: Variables by name. They override variables of the node.
    """
    variables, package = dict(values), PACKAGE.name

    # A local function is pickled by value, so it must not use names of this module.
    def orchestrator_setup() -> None:
        import contextlib
        import importlib
        import os

        os.environ.update(variables)
        with contextlib.suppress(ImportError):  # not installed on the node
            importlib.import_module(package)

    return orchestrator_setup


def apply_submitted_env(last: bool) -> None:
    """Set the variables sent by `submit` in this process; does nothing outside a submission.

    Args:
        last: Delete them from the GCS, because no later command of the submission needs them.

    Raises:
        ClusterError: The variables are no longer in the GCS.
    """
    key = os.environ.get(SUBMITTED_ENV_KEY)
    if not key:
        return
    from ray import _raylet

    client = _raylet.GcsClient(address=os.environ["RAY_ADDRESS"])  # type: ignore[attr-defined]
    content = client.internal_kv_get(key.encode(), None)
    if content is None:
        raise ClusterError(
            "the environment variables sent by `submit` were already read and are no longer on the cluster; "
            "submit the job again"
        )
    os.environ.update(json.loads(content))
    if last:
        client.internal_kv_del(key.encode(), False, None)
        del os.environ[SUBMITTED_ENV_KEY]

"""Environment variables on their way from the command to the driver, its tasks and its workers.

Tokens travel this way, so values are held in memory only: in `os.environ` of the processes that need them
and, while the job runs, in the table of functions that Ray's GCS keeps for the job. Ray's own `env_vars`
would write them into its logs, its job records and the command line that starts a worker. docs/environment.md
says what a user may rely on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from orchestrator.config.schema import JobSpec
from orchestrator.errors import ClusterError, SpecError
from orchestrator.package_data import PACKAGE

HANDOVER = "ORCHESTRATOR_ENVIRONMENT"
"""Names the entry of the GCS that holds what `submit` sends; the name is no secret, its content is."""
_PREFIXES = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_", "WANDB_", "MLFLOW_", "NCCL_", "TORCH_NCCL_", "GLOO_")
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")


def is_forwarded(name: str) -> bool:
    """Tell whether a variable is passed on although no job names it."""
    return name.startswith(_PREFIXES) or name.lower() in _PROXIES


def forwarded(environ: Mapping[str, str], names: Iterable[str] = ()) -> dict[str, str]:
    """Return the variables that are passed on.

    Args:
        environ: Where they are set.
        names: Those that are passed on besides the default ones, as `run.env` lists them.
    """
    wanted = set(names)
    return {name: value for name, value in environ.items() if name in wanted or is_forwarded(name)}


def values_of(job: JobSpec, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of `run.env`; where the job says null, the value that is set here.

    Raises:
        SpecError: With every variable that is null in the job and not set here.
    """
    found, unset = {}, []
    for name, value in job.run.env.items():
        if value is not None:
            found[name] = value.get_secret_value()
        elif name in environ:
            found[name] = environ[name]
        else:
            unset.append(name)
    if unset:
        raise SpecError(
            *(
                f"run.env.{name} is null, which takes the value from where the command runs, and {name} is "
                "not set here; export it, or remove it from run.env"
                for name in unset
            )
        )
    return found


def take_over(job: JobSpec) -> JobSpec:
    """Adopt what `submit` has sent, where it has, and then the job's own variables; as `adopt`."""
    handed_over(last=True)
    return adopt(job)


def adopt(job: JobSpec) -> JobSpec:
    """Put the variables of `run.env` into this process's environment, where all that it starts finds them.

    To be called before libraries are imported that read the environment at their import.

    Returns:
        The job without values: what is recorded, sent or shown of a job from here on holds names only.

    Raises:
        SpecError: With every variable that is null in the job and not set here.
    """
    os.environ.update(values_of(job, os.environ))
    return names_only(job)


def names_only(job: JobSpec) -> JobSpec:
    """Return the job with null for the value of every variable."""
    run = job.run.model_copy(update={"env": dict.fromkeys(job.run.env)})
    return job.model_copy(update={"run": run})


def worker_setup(values: Mapping[str, str]) -> Callable[[], None]:
    """Return what every worker process does first: set the variables, and import this program's package.

    Ray puts the driver's working directory first on a worker's path afterwards; an `orchestrator` package of
    another project there would shadow this one.

    Args:
        values: The variables by name. They replace what a node has of the same names.
    """
    known, package = dict(values), PACKAGE.name

    # Pickled by value, since it is local: no name of this module may be used inside.
    def orchestrator_setup() -> None:
        import contextlib
        import importlib
        import os

        os.environ.update(known)
        with contextlib.suppress(ImportError):  # not installed on this node
            importlib.import_module(package)

    return orchestrator_setup


def handed_over(last: bool) -> None:
    """Put what `submit` has sent into this process's environment, where it has sent anything.

    Args:
        last: Whether no later command of the same submission needs it, so that the GCS forgets it now.

    Raises:
        ClusterError: It was sent and is no longer there.
    """
    key = os.environ.get(HANDOVER)
    if not key:
        return
    from ray import _raylet

    client: Any = _raylet.GcsClient(  # type: ignore[attr-defined]
        address=os.environ["RAY_ADDRESS"]
    )
    content = client.internal_kv_get(key.encode(), None)
    if content is None:
        raise ClusterError(
            "the environment that `submit` sent with this job was read before and is no longer on the "
            "cluster; submit the job again"
        )
    os.environ.update(json.loads(content))
    if last:
        client.internal_kv_del(key.encode(), False, None)
        del os.environ[HANDOVER]

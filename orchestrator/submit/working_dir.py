"""The working directory uploaded with a job: this package, the job file and data with a relative path."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import SecretStr

from orchestrator.config import loader
from orchestrator.config.eval_sets import all_sources
from orchestrator.config.schema import JobSpec, SourceSpec
from orchestrator.config.validation import broken_rules
from orchestrator.data.file_patterns import has_wildcards
from orchestrator.data.model_tokenizer import with_chat_template
from orchestrator.data.sources import local_files, source_problem
from orchestrator.errors import SpecError
from orchestrator.package_data import BUNDLED, PACKAGE, RESOURCES, ROOT, resource
from orchestrator.train import environment

_logger = logging.getLogger(__name__)

JOB = "job.yaml"
_MOST_DATA_BYTES = 64 * 2**20
_MIB = 2**20
_DATASET_METADATA = ("dataset_dict.json", "dataset_info.json", "state.json")


def create_working_dir(job: JobSpec, folder: Path) -> None:
    """Write package, job file and data files into a folder; environment variables are sent separately.

    Args:
        job: The job; only the names in `run.env` are written.
        folder: An empty folder.

    Raises:
        SpecError: With every path of the job that is neither uploaded nor visible to the cluster.
    """
    files, problems = _data_files(job)
    problems += [*_collisions(files), *_outside(job)]
    sizes = {file: file.stat().st_size for file in files}
    if sum(sizes.values()) > _MOST_DATA_BYTES:
        largest = max(sizes, key=lambda file: sizes[file])
        problems.append(
            f"data files with a relative path have {sum(sizes.values()) / _MIB:,.1f} MiB in total, but not "
            f"more than 64 MiB are uploaded (the largest is {largest}); put them on shared storage and use "
            "absolute paths"
        )
    if problems:
        raise SpecError(*problems)
    _copy_program(folder)
    (folder / JOB).write_text(loader.dump(with_chat_template(job)), encoding="utf-8")
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copy2(file, folder / file)
        except OSError as error:
            raise SpecError(
                f"data file {file} cannot be read ({error.strerror}); check its permissions"
            ) from None


def _copy_program(folder: Path) -> None:
    """Copy the package and its data files into a folder; see `orchestrator.package_data`."""
    package = folder / PACKAGE.name
    skipped = shutil.ignore_patterns("__pycache__", "*.pyc", ".*_cache", BUNDLED.name)
    shutil.copytree(PACKAGE, package, ignore=skipped)
    for name in RESOURCES:
        source, target = resource(name), package / BUNDLED.name / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=skipped)
        else:
            shutil.copy2(source, target)


def _data_files(job: JobSpec) -> tuple[list[Path], list[str]]:
    """Return the data files to upload without duplicates, and a problem for every source that has none."""
    files: dict[Path, None] = {}
    problems: dict[str, None] = {}
    for _, source in all_sources(job):
        path = Path(source.path)
        if source.path.startswith(("builtin/", "/", "~")) or "://" in source.path:
            continue
        if ".." in path.parts:
            problems[f"data path {source.path} leaves the working directory; use an absolute path"] = None
        elif problem := source_problem(source):
            problems[problem] = None
        elif path.exists() or has_wildcards(source.path):
            files |= dict.fromkeys(_files_of(source))
        elif Path(path.parts[0]).is_dir():
            problems[
                f"data path {source.path} does not exist, and {path.parts[0]} is a local folder, so it is "
                "probably not a hub dataset; correct the path, or submit from a folder without "
                f"{path.parts[0]}"
            ] = None
        else:
            _logger.info(f"data {source.path} does not exist locally and is assumed to be a hub dataset")
    return list(files), list(problems)


def _files_of(source: SourceSpec) -> Iterator[Path]:
    """Yield the files of a source that a run reads, and the metadata files of a saved dataset."""
    data_files = [Path(file) for _, file in local_files(source, Path(source.path))]
    yield from data_files
    root = Path(source.path)
    if not root.is_dir():
        return
    folders = {root, *(file.parent for file in data_files)}
    metadata = [
        folder / name for folder in folders for name in _DATASET_METADATA if (folder / name).is_file()
    ]
    yield from metadata
    total = sum(file.is_file() for file in root.rglob("*"))
    size = sum(file.stat().st_size for file in data_files) / _MIB
    unused = total - len({*data_files, *metadata})
    skipped = f"; {unused} unused file{'s' * (unused != 1)} skipped" if unused > 0 else ""
    _logger.info(
        f"data folder {source.path}: uploading {len(data_files)} file{'s' * (len(data_files) != 1)} "
        f"({size:,.1f} MiB){skipped}"
    )


def _collisions(files: Sequence[Path]) -> Iterator[str]:
    for file in files:
        in_package = file.parts[0] == PACKAGE.name and (ROOT / file).exists()
        if file == Path(JOB) or in_package:
            yield (
                f"data file {file} would overwrite a file of orchestrator in the working directory; rename "
                "or move it"
            )


def _outside(job: JobSpec) -> Iterator[str]:
    """Yield a problem for each path that is only valid on this machine."""
    for field, path in (("model.path", job.model.path), ("method.adapter", job.method.adapter)):
        if not path or path.startswith(("builtin/", "/", "~")):
            continue
        if Path(path).exists():
            yield (
                f"{field}={path} is a local folder, and models are not uploaded; use an absolute path on "
                "storage that every node can read"
            )
        elif path.startswith("."):
            yield f"{field}={path} is relative and does not exist; use the absolute path on the cluster"
    for field, path in (
        ("checkpoint.storage", job.checkpoint.storage),
        ("parallel.offload_path", job.parallel.offload_path),
    ):
        if path and not path.startswith("~") and not Path(path).is_absolute():
            kind = (
                "on storage that every node can write"
                if field.startswith("checkpoint")
                else "on a local disk of the nodes"
            )
            yield (
                f"{field}={path} is relative and would be in a temporary folder on the cluster; use an "
                f"absolute path {kind}"
            )


def with_env_options(job: JobSpec, options: Sequence[str]) -> JobSpec:
    """Return the job with the --env options added to `run.env`; they take precedence.

    Args:
        job: The job.
        options: NAME=VALUE, or NAME for the current value of the variable.

    Raises:
        SpecError: With every option with an invalid name or an unset variable.
    """
    problems: list[str] = []
    env = dict(job.run.env)
    for text in options:
        name, equals, value = text.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            problems.append(f"--env {name}: not a valid variable name; use --env NAME=VALUE or --env NAME")
        elif not equals and name not in os.environ:
            problems.append(f"--env {name}: {name} is not set; export it, or use --env {name}=VALUE")
        else:
            env[name] = SecretStr(value if equals else os.environ[name])
    updated = job.model_copy(update={"run": job.run.model_copy(update={"env": env})})
    problems += [sentence for fields, sentence in broken_rules(updated) if fields[0].startswith("run.env.")]
    if problems:
        raise SpecError(*problems)
    return updated


def env_to_send(job: JobSpec, inherit: bool) -> dict[str, str]:
    """Return the environment variables to send: those forwarded by default, overridden by `run.env`.

    Raises:
        SpecError: With every variable that is null in the job and not set.
    """
    default = environment.forwarded_env(os.environ) if inherit else {}
    return {**default, **environment.resolve_env(job, os.environ)}

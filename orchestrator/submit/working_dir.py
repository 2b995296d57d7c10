"""What travels to a cluster with a job: this program, the job file, data with a relative path, variables."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pydantic import SecretStr

from orchestrator.config import loader
from orchestrator.config.schema import JobSpec, SourceSpec
from orchestrator.config.validation import broken_rules
from orchestrator.data.sources import local_files, source_problem
from orchestrator.errors import SpecError
from orchestrator.package_data import BUNDLED, PACKAGE, RESOURCES, ROOT, resource
from orchestrator.train import environment

JOB = "job.yaml"
_MOST_DATA_BYTES = 64 * 2**20
_MIB = 2**20
_OF_A_SAVED_SET = ("dataset_dict.json", "dataset_info.json", "state.json")


def pack(job: JobSpec, folder: Path, note: Callable[[str], None]) -> None:
    """Put all that travels but variables into a folder.

    Args:
        job: The job; of `run.env` only names are written.
        folder: An empty folder.
        note: Told what travels of a folder of data, and what is taken for a data set of the hub.

    Raises:
        SpecError: With everything that the job names, and that neither travels nor can be found on a cluster.
    """
    files, problems = _data_files(job, note)
    problems += [*_collisions(files), *_outside(job)]
    sizes = {file: file.stat().st_size for file in files}
    if sum(sizes.values()) > _MOST_DATA_BYTES:
        largest = max(sizes, key=lambda file: sizes[file])
        problems.append(
            f"data files with a relative path have {sum(sizes.values()) / _MIB:,.1f} MiB together, and not "
            f"more than 64 MiB travel (the largest is {largest}); put them where every node sees them, and "
            "name absolute paths"
        )
    if problems:
        raise SpecError(*problems)
    _copy_program(folder)
    (folder / JOB).write_text(loader.dump(job), encoding="utf-8")
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copy2(file, folder / file)
        except OSError as error:
            raise SpecError(
                f"data file {file} cannot be read ({error.strerror}), so it cannot travel; check its "
                "permissions"
            ) from None


def _copy_program(folder: Path) -> None:
    """Copy the package and the data files that it reads into a folder; see `orchestrator.config.paths`."""
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


def _data_files(job: JobSpec, note: Callable[[str], None]) -> tuple[list[Path], list[str]]:
    """Return the files that travel, each once, and a sentence for every source that cannot."""
    found: dict[Path, None] = {}
    problems: dict[str, None] = {}
    for source in (*job.data.train, *(job.eval.data if job.eval else ())):
        path = Path(source.path)
        if source.path.startswith(("builtin/", "/", "~")) or "://" in source.path:
            continue
        if ".." in path.parts:
            problems[f"data path {source.path} leaves the working directory; use an absolute path"] = None
        elif problem := source_problem(source):
            problems[problem] = None
        elif path.exists():
            found |= dict.fromkeys(_files_of(source, note))
        elif Path(path.parts[0]).is_dir():
            problems[
                f"data path {source.path} is not there, and {path.parts[0]} is a folder here, so that it is "
                "hardly meant for a data set of the hub; correct it, or submit from a folder that has no "
                f"{path.parts[0]}"
            ] = None
        else:
            note(f"data {source.path} is not here, and is taken for a data set of the hub")
    return list(found), list(problems)


def _files_of(source: SourceSpec, note: Callable[[str], None]) -> Iterator[Path]:
    """Yield the files of a source that a run reads, with what tells it how to read a saved data set."""
    read = [Path(file) for _, file in local_files(source, Path(source.path))]
    yield from read
    home = Path(source.path)
    if not home.is_dir():
        return
    folders = {home, *(file.parent for file in read)}
    described = [folder / name for folder in folders for name in _OF_A_SAVED_SET if (folder / name).is_file()]
    yield from described
    there = sum(file.is_file() for file in home.rglob("*"))
    size = sum(file.stat().st_size for file in read) / _MIB
    rest = there - len({*read, *described})
    stay = f"; {rest} other file{'s' * (rest != 1)}, which no run reads, stay here" if rest > 0 else ""
    note(
        f"data folder {source.path}: {len(read)} file{'s' * (len(read) != 1)} travel ({size:,.1f} MiB){stay}"
    )


def _collisions(files: Sequence[Path]) -> Iterator[str]:
    for file in files:
        ours = file.parts[0] == PACKAGE.name and (ROOT / file).exists()
        if file == Path(JOB) or ours:
            yield (
                f"data file {file} would take the place of a file of this program on the cluster; give it "
                "another name or folder"
            )


def _outside(job: JobSpec) -> Iterator[str]:
    """Yield a sentence for each path that means something only in this working directory."""
    for field, place in (("model.path", job.model.path), ("method.adapter", job.method.adapter)):
        if not place or place.startswith(("builtin/", "/", "~")):
            continue
        if Path(place).exists():
            yield (
                f"{field}={place} is a folder of this machine, and models do not travel; use the absolute "
                "path of storage that every node sees"
            )
        elif place.startswith("."):
            yield f"{field}={place} is relative, and nothing is there; use the absolute path on the cluster"
    for field, place in (
        ("checkpoint.storage", job.checkpoint.storage),
        ("parallel.offload_path", job.parallel.offload_path),
    ):
        if place and not place.startswith("~") and not Path(place).is_absolute():
            kind = "storage that every node sees" if field.startswith("checkpoint") else "a disk of the nodes"
            yield (
                f"{field}={place} is relative, and on a cluster it would lie in a temporary folder; use the "
                f"absolute path of {kind}"
            )


def with_variables(job: JobSpec, given: Sequence[str]) -> JobSpec:
    """Return the job with variables of the command line in `run.env`, where they take precedence.

    Args:
        job: The job.
        given: Each NAME=VALUE, or NAME for the value that is set here.

    Raises:
        SpecError: With every text that names no variable, or one that is not set here.
    """
    problems: list[str] = []
    env = dict(job.run.env)
    for text in given:
        name, equals, value = text.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            problems.append(
                f"--env {name}: not the name of a variable; write --env NAME=VALUE, or --env NAME"
            )
        elif not equals and name not in os.environ:
            problems.append(f"--env {name}: {name} is not set here; export it, or write --env {name}=VALUE")
        else:
            env[name] = SecretStr(value if equals else os.environ[name])
    found = job.model_copy(update={"run": job.run.model_copy(update={"env": env})})
    problems += [sentence for fields, sentence in broken_rules(found) if fields[0].startswith("run.env.")]
    if problems:
        raise SpecError(*problems)
    return found


def variables(job: JobSpec, inherit: bool) -> dict[str, str]:
    """Return the variables that travel: those of `run.env`, then the default ones that are set here.

    Raises:
        SpecError: With every variable that is null in the job and not set here.
    """
    default = environment.forwarded(os.environ) if inherit else {}
    return {**default, **environment.values_of(job, os.environ)}

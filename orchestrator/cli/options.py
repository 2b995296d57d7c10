"""Shared command-line arguments and options, and long ones of single commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="The job file (YAML).")]
JobFiles = Annotated[list[Path], typer.Argument(metavar="JOB...", help="Job files (YAML).")]
LookForFiles = Annotated[
    bool,
    typer.Option(
        "--files/--no-files",
        help="Check data, models and folders on this machine; use --no-files for a job that runs elsewhere.",
    ),
]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="FIELD=VALUE", help="Override a field, e.g. optim.lr=1e-5; repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Force = Annotated[
    bool, typer.Option("--force", help="Train even if the plan predicts that the job does not fit.")
]
Address = Annotated[
    str | None, typer.Option(help="Address of the Ray cluster, e.g. auto; default is a local Ray.")
]
Certificate = Annotated[Path | None, typer.Option(help="CA certificate file for an https dashboard.")]
Variables = Annotated[
    list[str],
    typer.Option(
        "--env",
        metavar="NAME[=VALUE]",
        help="Environment variable of driver and workers; NAME alone uses the current value; repeatable.",
    ),
]
InheritVariables = Annotated[
    bool, typer.Option(help="Send the current HF_*, WANDB_*, MLFLOW_*, NCCL_*, GLOO_* and proxy variables.")
]
DocumentTokens = Annotated[
    float,
    typer.Option(
        min=0.0,
        help="Mean document length seen by a token: `mean_square_tokens` of `pack`. Default: attention over "
        "whole packs, an upper bound.",
    ),
]
NetworkGbits = Annotated[
    float | None,
    typer.Option(min=0.1, help="Network bandwidth per node in Gbit/s; default from the hardware catalogue."),
]
Show = Annotated[
    int,
    typer.Option(
        "--show",
        metavar="N",
        min=0,
        help="Print the first N rows by token: which have a loss, and why rows are left out.",
    ),
]
ShowRow = Annotated[
    list[str],
    typer.Option(
        "--show-row",
        metavar="FILE:LINE",
        help="Print this row of the job's data in the same way; repeatable. In Parquet and Arrow files, "
        "LINE is the row number.",
    ),
]
RowsAsHtml = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Write the rows of --show and --show-row to an HTML page."),
]
PodImage = Annotated[str | None, typer.Option(help="rayjob: Container image of all pods.")]
GpusPerNode = Annotated[int | None, typer.Option(help="rayjob: GPUs per node, one worker each; default 8.")]
NodesOfPods = Annotated[int | None, typer.Option(help="rayjob, CPU only: Number of worker pods; default 1.")]
CpusPerNode = Annotated[int | None, typer.Option(help="rayjob: CPUs per worker pod.")]
MemoryPerNode = Annotated[int | None, typer.Option(help="rayjob: Memory per worker pod in GiB.")]
VolumeClaim = Annotated[str, typer.Option(help="rayjob: PersistentVolumeClaim of the shared volume.")]
MountPath = Annotated[str, typer.Option(help="rayjob: Mount path of the shared volume.")]
Namespace = Annotated[str | None, typer.Option(help="rayjob: Namespace of the objects.")]
DeadlineHours = Annotated[int, typer.Option(help="rayjob: Hours after which an attempt is terminated.")]

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

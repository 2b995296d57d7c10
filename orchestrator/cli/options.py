"""Arguments and options that several commands take, and the longer ones of single commands."""

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
        help="Look for data, models and folders on this machine; --no-files for a job that is to run "
        "elsewhere.",
    ),
]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="FIELD=VALUE", help="Override a field, e.g. optim.lr=1e-5; repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Force = Annotated[bool, typer.Option("--force", help="Train although the plan says that it cannot fit.")]
Address = Annotated[str | None, typer.Option(help="Ray cluster to use, e.g. auto; none starts a local Ray.")]
Certificate = Annotated[
    Path | None, typer.Option(help="Certificate of the authority that signed the dashboard's.")
]
Variables = Annotated[
    list[str],
    typer.Option(
        "--env",
        metavar="NAME[=VALUE]",
        help="Environment variable of driver and workers; NAME alone takes its value here; repeatable.",
    ),
]
InheritVariables = Annotated[
    bool, typer.Option(help="Send HF_*, WANDB_*, MLFLOW_*, NCCL_*, GLOO_* and proxies as they are set here.")
]
DocumentTokens = Annotated[
    float,
    typer.Option(
        min=0.0,
        help="Tokens of the document that a token is in, on average: `mean_square_tokens` of `pack`. "
        "Without it attention is counted over whole packs, an upper limit.",
    ),
]
NetworkGbits = Annotated[
    float | None,
    typer.Option(min=0.1, help="Gbit/s of a node's network; the catalogue's, eight fast ports, by default."),
]

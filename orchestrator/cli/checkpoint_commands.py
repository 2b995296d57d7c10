"""The commands of `orchestrator checkpoint`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.exit_codes import exit_codes
from orchestrator.cli.options import AsJson
from orchestrator.cli.output import write_result
from orchestrator.errors import TrainingError

app = typer.Typer(
    help="Show, verify, compare and convert checkpoints.", no_args_is_help=True, rich_markup_mode=None
)
Checkpoint = Annotated[
    Path, typer.Argument(metavar="PATH", help="A checkpoint, or a run whose newest checkpoint is meant.")
]


@app.command(epilog="Example: orchestrator checkpoint show runs/quickstart")
def show(path: Checkpoint, as_json: AsJson = False) -> None:
    """Print who wrote a checkpoint, and what is in it."""
    with exit_codes():
        from orchestrator.checkpoint.inspection import contents, contents_text, find

        found = contents(find(path))
        write_result(json.dumps(found) if as_json else contents_text(found))


@app.command(epilog="Example: orchestrator checkpoint verify runs/quickstart")
def verify(path: Checkpoint, as_json: AsJson = False) -> None:
    """Read a checkpoint and compare every block with its digest."""
    with exit_codes():
        from orchestrator.checkpoint import checkpoint_dir
        from orchestrator.checkpoint.inspection import find

        checkpoint = find(path)
        problems = checkpoint_dir.verify(checkpoint)
        if as_json:
            write_result(json.dumps({"path": str(checkpoint), "whole": not problems, "problems": problems}))
        if problems:
            raise TrainingError(*problems)
        if not as_json:
            write_result(f"{checkpoint} is whole")


@app.command(epilog="Example: orchestrator checkpoint diff runs/a runs/b/checkpoints/step-00000100")
def diff(
    path: Checkpoint,
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="The checkpoint to compare with.")],
    as_json: AsJson = False,
) -> None:
    """Compare the tensors of two checkpoints. The exit code is 1 if any differs."""
    with exit_codes():
        from orchestrator.checkpoint.inspection import contents, differences, differences_text, find

        one, another = find(path), find(other)
        names = contents(one)["tensors"].keys() | contents(another)["tensors"].keys()
        found = list(differences(one, another))
        listed = {"tensors": len(names), "differing": [asdict(each) for each in found]}
        write_result(json.dumps(listed) if as_json else differences_text(found, len(names)))
        if found:
            raise typer.Exit(1)


@app.command(epilog="Example: orchestrator checkpoint convert runs/quickstart --to tensors")
def convert(
    path: Checkpoint,
    to: Annotated[Path, typer.Option(help="Folder to create.")],
    as_json: AsJson = False,
) -> None:
    """Write the fp32 weights and optimizer states as safetensors with whole tensors; see also `export`."""
    with exit_codes("the output folder is unchanged"):
        from orchestrator.checkpoint import inspection

        files = [str(file) for file in inspection.convert(inspection.find(path), to)]
        write_result(json.dumps({"files": files}) if as_json else "\n".join(files))

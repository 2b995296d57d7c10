"""The `orchestrator` command line.

Commands import their modules when they run, so that `validate`, `plan` and `render` start in well under a
second.
"""

from __future__ import annotations

import sys
from pathlib import Path

from orchestrator import __version__, shutdown

if __name__ == "__main__" or Path(sys.argv[0]).name == "orchestrator":
    shutdown.install()  # before the imports below, which take most of the time of a light command

import json
from typing import Annotated, Literal

import typer

from orchestrator.checks.inputs import input_problems
from orchestrator.cli import checkpoint_commands
from orchestrator.cli.exit_codes import exit_codes, fail
from orchestrator.cli.job_files import check_job_files, load_for_submit, load_for_train, print_warnings
from orchestrator.cli.options import (
    Address,
    AsJson,
    Certificate,
    CpusPerNode,
    DeadlineHours,
    DocumentTokens,
    Force,
    GpusPerNode,
    InheritVariables,
    JobFile,
    JobFiles,
    LookForFiles,
    MemoryPerNode,
    MountPath,
    Namespace,
    NetworkGbits,
    NodesOfPods,
    Overrides,
    PodImage,
    RowsAsHtml,
    Show,
    ShowRow,
    Variables,
    VolumeClaim,
)
from orchestrator.cli.output import (
    TolerantStream,
    prepare_streams,
    stdout_for_results,
    write_message,
    write_result,
)
from orchestrator.cli.run_tables import packing_table, result_texts, summary
from orchestrator.config import loader
from orchestrator.console_log import LEVEL_VARIABLE, console_log
from orchestrator.errors import ClusterError, SpecError, TrainingError


class _App(typer.Typer):
    def __call__(self, *arguments: object, **options: object) -> object:
        """Install signal handlers and run the command; tests call commands differently."""
        shutdown.install()
        options.setdefault("prog_name", "orchestrator")  # with `python -m orchestrator` as well
        return super().__call__(*arguments, **options)


app = _App(
    name="orchestrator",
    help="Multi-node fine-tuning of large language models with Ray Train and DeepSpeed, from one job file.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(checkpoint_commands.app, name="checkpoint")


def _print_version(requested: bool) -> None:
    if requested:
        write_result(f"orchestrator {__version__}")
        raise typer.Exit


@app.callback()
def _prepare(
    log_level: Annotated[
        str | None,
        typer.Option(
            metavar="LEVEL",
            help=f"Lowest level of messages: debug, info, warning, error; {LEVEL_VARIABLE} sets it too.",
        ),
    ] = None,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    prepare_streams()
    try:
        console_log(TolerantStream(sys.stderr), log_level)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@app.command(epilog="Example: orchestrator validate launch/jobs/quickstart.yaml")
def validate(
    jobs: JobFiles, files: LookForFiles = True, overrides: Overrides = [], as_json: AsJson = False
) -> None:
    """Check job files and the paths they use on this machine. Prints all errors and warnings at once."""
    problems, warnings = check_job_files(jobs, overrides, files)
    if as_json:
        write_result(json.dumps({"valid": not problems, "problems": problems, "warnings": warnings}))
        raise typer.Exit(2 if problems else 0)
    print_warnings(warnings)
    if problems:
        fail(str(SpecError(*problems)), 2)
    write_result(f"{len(jobs)} job file{'s' if len(jobs) > 1 else ''} valid")


@app.command(
    epilog="Example: orchestrator render --target deepspeed launch/jobs/quickstart.yaml; "
    "orchestrator render --target rayjob job.yaml --gpus-per-node 8 > rayjob.yaml"
)
def render(
    job: JobFile,
    target: Annotated[
        Literal["deepspeed", "rayjob"],
        typer.Option(help="Output: the DeepSpeed configuration, or a RayJob for Kubernetes."),
    ] = "deepspeed",
    device: Annotated[
        Literal["cuda", "cpu"] | None, typer.Option(help="Device type if the job has device: auto.")
    ] = None,
    overrides: Overrides = [],
    image: PodImage = None,
    gpus_per_node: GpusPerNode = None,
    nodes: NodesOfPods = None,
    cpus_per_node: CpusPerNode = None,
    memory_per_node: MemoryPerNode = None,
    claim: VolumeClaim = "orchestrator-shared",
    mount: MountPath = "/mnt/shared",
    namespace: Namespace = None,
    deadline_hours: DeadlineHours = 168,
) -> None:
    """Print the DeepSpeed configuration or RayJob manifest of a job."""
    with exit_codes():
        from orchestrator.cli.render_output import rendered
        from orchestrator.kubernetes.pod_sizing import PodOptions

        pods = (image, gpus_per_node, nodes, cpus_per_node, memory_per_node, claim, mount, namespace)
        options = PodOptions(*pods, deadline_hours)
        write_result(rendered(loader.load(job, overrides), target, device, options))


@app.command(epilog="Example: orchestrator doctor --address auto --storage /mnt/shared/runs")
def doctor(
    address: Address = None,
    storage: Annotated[
        Path | None,
        typer.Option(
            help="Folder that every node must be able to read and write, such as checkpoint.storage."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check all nodes of a cluster and time an all-reduce.

    Checks GPUs, package versions, /dev/shm, storage and clocks.
    """
    with exit_codes():
        from orchestrator.train.environment import apply_submitted_env

        apply_submitted_env(last=False)  # NCCL and gloo variables select the network of the all-reduce
        from orchestrator.cli.doctor_output import format_report
        from orchestrator.train.doctor import diagnose_cluster

        with stdout_for_results():
            cluster_report = diagnose_cluster(address, storage and storage.expanduser().absolute())
        write_result(json.dumps(cluster_report.as_json()) if as_json else format_report(cluster_report))
        problems = [diag.sentence for diag in cluster_report.diagnostics if diag.level == "problem"]
        if problems:
            raise ClusterError(*problems)


@app.command(epilog="Example: orchestrator pack launch/jobs/quickstart.yaml --show 5")
def pack(
    job: JobFile,
    address: Address = None,
    overrides: Overrides = [],
    show: Show = 0,
    show_row: ShowRow = [],
    html: RowsAsHtml = None,
    as_json: AsJson = False,
) -> None:
    """Tokenize and pack the data, and print statistics of rows and tokens."""
    with exit_codes():
        from orchestrator.train.environment import apply_submitted_and_job_env

        spec = apply_submitted_and_job_env(loader.load(job, overrides, input_problems))
        from orchestrator.cli.row_view import shown_rows

        with shown_rows(spec, show, show_row, html, as_json) as rows, stdout_for_results():
            from orchestrator.train.driver import prepare

            figures = {**prepare(spec, address), **rows}
        write_result(json.dumps(figures) if as_json else packing_table(figures))


@app.command(epilog="Example: orchestrator train launch/jobs/quickstart.yaml")
def train(
    job: JobFile,
    address: Address = None,
    overrides: Overrides = [],
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train a job. The same command resumes it from its last checkpoint."""
    with exit_codes("run the same command again to resume from the last checkpoint"):
        from orchestrator.train.environment import apply_submitted_and_job_env

        spec = apply_submitted_and_job_env(load_for_train(job, overrides, workers_here=address is None))
        from orchestrator.cli.progress import Progress
        from orchestrator.train.resume import finished_before

        with stdout_for_results() as out:
            console_log(TolerantStream(sys.stderr if as_json else out))
            report = finished_before(spec)
            if report is None:
                from orchestrator.train.driver import run

                report = run(spec, address, Progress(), force=force)
        write_result(json.dumps(report) if as_json else summary(report))


@app.command(
    epilog="Example: orchestrator plan launch/jobs/published/xtuner/llama2-7b-32k.yaml --gpus 8xA100-80G-SXM"
)
def plan(
    job: JobFile,
    gpus: Annotated[
        str,
        typer.Option(
            metavar="NODESxGPUSxDEVICE", help="Nodes, GPUs per node and device, e.g. 4x8xA100-80G-SXM."
        ),
    ],
    overrides: Overrides = [],
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="Print memory and time by component, and why other configurations lose."
        ),
    ] = False,
    catalogue: Annotated[Path | None, typer.Option(help="Additional hardware catalogue (TOML).")] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Folder for plots of memory by component and TGS over max_length.")
    ] = None,
    document_tokens: DocumentTokens = 0.0,
    network_gbits: NetworkGbits = None,
    as_json: AsJson = False,
) -> None:
    """Predict memory and throughput of a job. Suggests the fastest configuration that fits."""
    with exit_codes():
        spec = loader.load(job, overrides)
        from orchestrator.cli import plan_output

        found, remedies = plan_output.planned(spec, gpus, catalogue, plots, document_tokens, network_gbits)
        write_result(
            plan_output.as_json(found, remedies) if as_json else plan_output.text(found, remedies, explain)
        )
        if found.best is None:
            raise ClusterError(
                f"no configuration of {spec.name} fits on {found.cluster} ({found.considered:,} "
                "considered); change the job as suggested, or use other nodes"
            )


@app.command(epilog="Example: orchestrator bench launch/jobs/published/xtuner-toy.yaml")
def bench(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP", help="The sweep file (YAML).")],
    address: Address = None,
    overrides: Overrides = [],
    plots: Annotated[bool, typer.Option(help="Draw plots.")] = True,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Rerun failed cells, except those that ran out of memory.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Benchmark all cells of a sweep. The same command resumes it."""
    with exit_codes("run the same command again to resume with the cells that have no row"):
        from orchestrator.bench import report as sweep_report
        from orchestrator.bench.plots import require_matplotlib
        from orchestrator.bench.runner import run_cells
        from orchestrator.bench.sweep import load
        from orchestrator.train.environment import apply_submitted_and_job_env

        spec = load(sweep, overrides)
        for cell in spec.cells:
            apply_submitted_and_job_env(cell.job)  # inherited by the process of each cell
        if plots:
            require_matplotlib()
        rows = run_cells(spec, address, write_message, retry_failed)
        files = sweep_report.write(spec.folder, plots)
        table, _ = sweep_report.load(spec.folder)
        write_result((table.json() if as_json else table.markdown()).rstrip())
        write_message(f"written: {', '.join(str(file) for file in files)}")
        failed = [row.cell for row in rows if row.status == "failed"]
        if failed:
            raise TrainingError(
                f"{len(failed)} of {len(rows)} cells failed: {', '.join(failed)}; see the table for reasons"
            )


@app.command(epilog="Example: orchestrator submit job.yaml --address http://HEAD:8265")
def submit(
    job: JobFile,
    address: Annotated[str, typer.Option(help="Dashboard of the Ray cluster, e.g. http://HEAD:8265.")],
    wait: Annotated[bool, typer.Option(help="Stream the log until the run ends.")] = True,
    doctor: Annotated[bool, typer.Option(help="Run `doctor` on the cluster before training.")] = True,
    certificate: Certificate = None,
    env: Variables = [],
    inherit_env: InheritVariables = True,
    overrides: Overrides = [],
    force: Force = False,
) -> None:
    """Train a job on a cluster through Ray's job submission API. Authenticates with RAY_AUTH_TOKEN."""
    with exit_codes("the job keeps running; use the commands above to follow or stop it"):
        spec = load_for_submit(job, overrides)
        from orchestrator.submit import submit as submission
        from orchestrator.submit.working_dir import with_env_options

        options = submission.Submission(wait, doctor, force, inherit_env)
        head = submission.Head(address, certificate)
        raise typer.Exit(submission.submit(with_env_options(spec, env), head, options, write_result))


@app.command(epilog="Example: orchestrator export runs/quickstart --to model --dtype bf16 --shard-size 2GB")
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run directory, STORAGE/NAME.")],
    to: Annotated[Path, typer.Option(help="Output folder; new, empty, or an unmodified earlier export.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into the base model.")] = False,
    step: Annotated[
        int | None, typer.Option(help="Step of the checkpoint to export; default is the newest.")
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        typer.Option(help="Dtype of the weights; default is that of the run."),
    ] = None,
    shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Maximum size of a weight file, e.g. 2GB or 500MB.")
    ] = "5GB",
    as_json: AsJson = False,
) -> None:
    """Export a checkpoint as Hugging Face safetensors. Writes the model, its adapter, or both merged."""
    with exit_codes("the output folder is unchanged"):
        with stdout_for_results():
            from orchestrator.export.run_exports import export_run
            from orchestrator.export.weight_files import parse_size

            done = export_run(run, to, merge, step, dtype, parse_size(shard_size))
        write_result(
            json.dumps(done.as_json()) if as_json else f"exported step {done.step} to {to} ({done.dtype})"
        )


@app.command(
    epilog="Example: orchestrator report runs/quickstart; orchestrator report --compare runs/a runs/b"
)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs or sweeps.")],
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Test whether two runs or sweeps differ by more than noise."),
    ] = False,
    warmup_steps: Annotated[
        int, typer.Option(min=0, help="Initial steps of a run that --compare ignores.")
    ] = 2,
    layout: Annotated[
        str | None, typer.Option(help="Table layout of a sweep; default is that of the sweep.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print or compare the results of runs and sweeps."""
    with exit_codes():
        for text in result_texts(runs, compare, warmup_steps, layout, as_json):
            write_result(text)


if __name__ == "__main__":
    app()

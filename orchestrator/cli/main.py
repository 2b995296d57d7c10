"""The command `orchestrator`: validate, doctor, pack, train, bench, submit, export, render, report.

Commands import what they need when they run, so that checking a job file answers in well under a second.
"""

from __future__ import annotations

import sys
from pathlib import Path

from orchestrator import shutdown

if __name__ == "__main__" or Path(sys.argv[0]).name == "orchestrator":
    shutdown.install()  # before the imports below, which take most of what a light command takes

import json
from typing import Annotated, Any, Literal

import typer

from orchestrator.checks.inputs import input_problems
from orchestrator.cli.exit_codes import exit_codes, fail
from orchestrator.cli.job_files import examined, load_to_send, load_to_train, warn
from orchestrator.cli.options import (
    Address,
    AsJson,
    Certificate,
    DocumentTokens,
    Force,
    InheritVariables,
    JobFile,
    JobFiles,
    LookForFiles,
    NetworkGbits,
    Overrides,
    Variables,
)
from orchestrator.cli.output import TolerantStream, prepare_streams, stdout_for_results
from orchestrator.cli.output import write_message as _tell
from orchestrator.cli.output import write_result as _say
from orchestrator.cli.run_tables import SUMMARY_FIELDS, read_report, side_by_side, summary, table
from orchestrator.config import loader
from orchestrator.config.auto_values import resolve_device, resolve_dtype
from orchestrator.console_log import LEVEL_VARIABLE, console_log
from orchestrator.errors import ClusterError, SpecError, TrainingError


class _App(typer.Typer):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Run the command that the process was started for; tests call commands in other ways."""
        shutdown.install()
        return super().__call__(*arguments, **options)


app = _App(
    name="orchestrator",
    help="Fine-tune large language models on many nodes: one job file in, a trained model and numbers out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _prepare(
    log_level: Annotated[
        str | None,
        typer.Option(
            metavar="LEVEL",
            help=f"Lowest level of messages: debug, info, warning, error; {LEVEL_VARIABLE} sets it too.",
        ),
    ] = None,
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
    """Check job files, and what they name on this machine; print every error at once, and warnings."""
    problems, warnings = examined(jobs, overrides, files)
    if as_json:
        _say(json.dumps({"valid": not problems, "problems": problems, "warnings": warnings}))
        raise typer.Exit(2 if problems else 0)
    warn(warnings)
    if problems:
        fail(str(SpecError(*problems)), 2)
    _say(f"{len(jobs)} job file{'s' if len(jobs) > 1 else ''} valid")


@app.command(
    epilog="Example: orchestrator render --target deepspeed launch/jobs/quickstart.yaml; "
    "orchestrator render --target rayjob job.yaml --gpus-per-node 8 > rayjob.yaml"
)
def render(
    job: JobFile,
    target: Annotated[
        Literal["deepspeed", "rayjob"],
        typer.Option(help="What to print: DeepSpeed's configuration, or a RayJob for Kubernetes."),
    ] = "deepspeed",
    device: Annotated[
        Literal["cuda", "cpu"] | None, typer.Option(help="Device kind where the job says auto.")
    ] = None,
    overrides: Overrides = [],
    image: Annotated[str | None, typer.Option(help="rayjob: image of all pods.")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(help="rayjob: GPUs of a node, one worker each; 8 if not given.")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(help="rayjob, on CPU: pods of workers; 1 if not given.")
    ] = None,
    cpus_per_node: Annotated[int | None, typer.Option(help="rayjob: processors of a pod of workers.")] = None,
    memory_per_node: Annotated[
        int | None, typer.Option(help="rayjob: GiB of memory of a pod of workers.")
    ] = None,
    claim: Annotated[str, typer.Option(help="rayjob: claim of the shared volume.")] = "orchestrator-shared",
    mount: Annotated[str, typer.Option(help="rayjob: where it is mounted.")] = "/mnt/shared",
    namespace: Annotated[str | None, typer.Option(help="rayjob: namespace of the objects.")] = None,
    deadline_hours: Annotated[int, typer.Option(help="rayjob: hours after which a try is ended.")] = 168,
) -> None:
    """Print what would be used, and apply nothing."""
    with exit_codes():
        spec = loader.load(job, overrides)
        kind = device or resolve_device(spec.parallel.device, has_gpus=True)
        from orchestrator.kubernetes.pod_sizing import PodOptions

        options = PodOptions(
            image,
            gpus_per_node,
            nodes,
            cpus_per_node,
            memory_per_node,
            claim,
            mount,
            namespace,
            deadline_hours,
        )
        if target == "rayjob":
            from orchestrator.kubernetes.rayjob import manifest

            _say(manifest(spec, options, kind).rstrip("\n"))
            return
        if options != PodOptions():
            raise SpecError(f"target={target} takes no options of pods and nodes; add --target rayjob")
        from orchestrator.parallel.deepspeed_config import render as render_deepspeed

        dtype = resolve_dtype(spec.model.dtype, kind)
        _say(json.dumps(render_deepspeed(spec, dtype, kind), indent=2))


@app.command(epilog="Example: orchestrator doctor --address auto --storage /mnt/shared/runs")
def doctor(
    address: Address = None,
    storage: Annotated[
        Path | None,
        typer.Option(help="Folder that every node is to read and write, such as checkpoint.storage."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look at every node before a job is given to it: GPUs, versions, storage, clocks, and an all-reduce."""
    with exit_codes():
        from orchestrator.train.environment import apply_submitted_env

        apply_submitted_env(last=False)  # variables of NCCL and gloo decide what the all-reduce goes through
        from orchestrator.cli.doctor_output import format_report
        from orchestrator.train.doctor import diagnose_cluster

        with stdout_for_results():
            cluster_report = diagnose_cluster(address, storage and storage.expanduser().absolute(), _tell)
        _say(json.dumps(cluster_report.as_json()) if as_json else format_report(cluster_report))
        problems = [diag.sentence for diag in cluster_report.diagnostics if diag.level == "problem"]
        if problems:
            raise ClusterError(*problems)


@app.command(epilog="Example: orchestrator pack launch/jobs/quickstart.yaml --json")
def pack(
    job: JobFile,
    address: Address = None,
    overrides: Overrides = [],
    as_json: AsJson = False,
) -> None:
    """Tokenise and pack only, and say what became of every row and token."""
    with exit_codes():
        from orchestrator.train.environment import apply_submitted_and_job_env

        spec = apply_submitted_and_job_env(loader.load(job, overrides, input_problems))
        with stdout_for_results():
            from orchestrator.train.driver import prepare

            figures = prepare(spec, address)
        sources = figures.pop("sources") if not as_json else []
        _say(json.dumps(figures) if as_json else table(figures))
        for source in sources if len(sources) > 1 else []:
            _say(f"{source['share_of_tokens']:.1%} of the tokens from {source['path']}")


@app.command(epilog="Example: orchestrator train launch/jobs/quickstart.yaml")
def train(
    job: JobFile,
    address: Address = None,
    overrides: Overrides = [],
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train a job through Ray Train; run it again after a failure and it goes on from its last checkpoint."""
    with exit_codes("run the same command again and it goes on from the last checkpoint"):
        from orchestrator.train.environment import apply_submitted_and_job_env

        spec = apply_submitted_and_job_env(load_to_train(job, overrides, workers_here=address is None))
        from orchestrator.cli.progress import Progress
        from orchestrator.train.resume import finished_before

        with stdout_for_results() as out:
            console_log(TolerantStream(sys.stderr if as_json else out))
            report = finished_before(spec)
            if report is None:
                from orchestrator.train.driver import run

                report = run(spec, address, Progress(), force=force)
        _say(json.dumps(report) if as_json else summary(report))


@app.command(
    epilog="Example: orchestrator plan launch/jobs/published/xtuner/llama2-7b-32k.yaml --gpus 8xA100-80G-SXM"
)
def plan(
    job: JobFile,
    gpus: Annotated[
        str, typer.Option(metavar="NODESxGPUSxDEVICE", help="The machines, e.g. 4x8xA100-80G-SXM.")
    ],
    overrides: Overrides = [],
    explain: Annotated[
        bool, typer.Option("--explain", help="Print memory and time by part, and why every other way loses.")
    ] = False,
    catalogue: Annotated[
        Path | None, typer.Option(help="A catalogue of devices of your own (TOML), beside that which ships.")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Folder for plots of memory by part and TGS over max_length.")
    ] = None,
    document_tokens: DocumentTokens = 0.0,
    network_gbits: NetworkGbits = None,
    as_json: AsJson = False,
) -> None:
    """Predict what fits and how fast, choose how to spread the job, and say why; nothing is started."""
    with exit_codes():
        spec = loader.load(job, overrides)
        from orchestrator.cli import plan_output

        found, remedies = plan_output.planned(spec, gpus, catalogue, plots, document_tokens, network_gbits)
        _say(plan_output.as_json(found, remedies) if as_json else plan_output.text(found, remedies, explain))
        if found.best is None:
            raise ClusterError(f"{spec.name} fits on {found.machines} in none of {found.considered:,} ways")


@app.command(epilog="Example: orchestrator bench launch/jobs/published/xtuner-toy.yaml")
def bench(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP", help="The sweep file (YAML).")],
    address: Address = None,
    overrides: Overrides = [],
    plots: Annotated[bool, typer.Option(help="Draw plots.")] = True,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run cells again that failed, but for lack of memory.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure every cell of a sweep in a process of its own; run it again and it goes on where it stood."""
    with exit_codes("run the same command again and it goes on with the cells that have no row"):
        from orchestrator.bench import report as sweep_report
        from orchestrator.bench.plots import require_matplotlib
        from orchestrator.bench.runner import run_cells
        from orchestrator.bench.sweep import load
        from orchestrator.train.environment import apply_submitted_and_job_env

        wanted = load(sweep, overrides)
        for cell in wanted.cells:
            apply_submitted_and_job_env(cell.job)  # each cell's process inherits it
        if plots:
            require_matplotlib()
        rows = run_cells(wanted, address, _tell, retry_failed)
        files = sweep_report.write(wanted.folder, plots)
        table, _ = sweep_report.load(wanted.folder)
        _say((table.json() if as_json else table.markdown()).rstrip())
        _tell(f"written: {', '.join(str(file) for file in files)}")
        failed = [row.cell for row in rows if row.status == "failed"]
        if failed:
            raise TrainingError(
                f"{len(failed)} of {len(rows)} cells failed: {', '.join(failed)}; see the table"
            )


@app.command(epilog="Example: orchestrator submit job.yaml --address http://HEAD:8265")
def submit(
    job: JobFile,
    address: Annotated[str, typer.Option(help="Dashboard of the Ray cluster, http://HEAD:8265.")],
    wait: Annotated[bool, typer.Option(help="Stream the log until the run ends.")] = True,
    doctor: Annotated[bool, typer.Option(help="Look at every node before the training starts.")] = True,
    certificate: Certificate = None,
    env: Variables = [],
    inherit_env: InheritVariables = True,
    overrides: Overrides = [],
    force: Force = False,
) -> None:
    """Train a job on a cluster through Ray's job submission API; a token is taken from RAY_AUTH_TOKEN."""
    with exit_codes("the job goes on; the commands above follow it and end it"):
        spec = load_to_send(job, overrides)
        from orchestrator.submit import submit as submission
        from orchestrator.submit.working_dir import with_env_options

        options = submission.Submission(wait, doctor, force, inherit_env)
        head = submission.Head(address, certificate)
        raise typer.Exit(submission.submit(with_env_options(spec, env), head, options, (_say, _tell)))


@app.command(epilog="Example: orchestrator export runs/quickstart --to model --dtype bf16 --shard-size 2GB")
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder, STORAGE/NAME.")],
    to: Annotated[
        Path, typer.Option(help="Folder to write; it may be new, empty, or an unchanged earlier export.")
    ],
    merge: Annotated[bool, typer.Option("--merge", help="Add adapters to the base model's weights.")] = False,
    step: Annotated[
        int | None, typer.Option(help="Step of the checkpoint to export; the newest if not given.")
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        typer.Option(help="Number format of the weights; the run's if not given."),
    ] = None,
    shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest size of a file of weights, e.g. 2GB or 500MB.")
    ] = "5GB",
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint of a run as Hugging Face safetensors: the model, its adapter, or both merged."""
    with exit_codes("the folder is as it was"):
        with stdout_for_results():
            from orchestrator.export.run_exports import export_run
            from orchestrator.export.weight_files import parse_size

            done = export_run(run, to, merge, step, dtype, parse_size(shard_size))
        _say(json.dumps(done.as_json()) if as_json else f"exported step {done.step} to {to} ({done.dtype})")


@app.command(
    epilog="Example: orchestrator report runs/quickstart; orchestrator report --compare runs/a runs/b"
)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or of sweeps.")],
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Say of two runs or sweeps whether they differ by more than noise."),
    ] = False,
    warmup_steps: Annotated[
        int, typer.Option(min=0, help="Steps at the start of a run that --compare leaves out.")
    ] = 2,
    layout: Annotated[
        str | None, typer.Option(help="Layout of a sweep's table; none takes that of the sweep.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the summaries of finished runs, side by side where there are several, or tables of sweeps."""
    with exit_codes():
        from orchestrator.bench.report import is_sweep

        if compare:
            from orchestrator.bench.compare import compare as compare_two

            if len(runs) != 2:
                raise SpecError(f"--compare takes two folders, and {len(runs)} are given; name A and B")
            found = compare_two(runs[0], runs[1], warmup_steps)
            _say((found.json() if as_json else found.markdown()).rstrip())
            return
        if any(is_sweep(run) for run in runs):
            from orchestrator.bench.report import load

            for run in runs:
                found, _ = load(run, layout)
                _say((found.json() if as_json else found.markdown()).rstrip())
            return
        fields = SUMMARY_FIELDS if len(runs) == 1 and not as_json else ("name",)
        reports = [read_report(run, fields) for run in runs]
        if as_json:
            _say(json.dumps(reports))
        elif len(reports) == 1:
            _say(summary(reports[0]))
        else:
            _say(side_by_side(reports))


if __name__ == "__main__":
    app()

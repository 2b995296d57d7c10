"""Invalid input of every kind: one clear error, the right exit code, no traceback, no files left or lost."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import Finished, Observed, job_text, losses, orchestrator, processes_of, wait_until
from tests.support.checkpoints import flip_a_bit


def _write(folder: Path, text: str | bytes) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "job.yaml").write_bytes(data)


def _assert_clear(done: Finished, code: int, *words: str) -> None:
    """Check that stderr has a title and errors with value, rule and remedy."""
    assert done.code == code, f"{done.out[-2000:]}\n{done.err[-2000:]}"
    block = done.err.strip()
    titles = {2: "job file error:", 3: "cluster error:", 4: "training error:"}
    assert titles[code] in block
    for word in words:
        assert word in block


# Each case changes one field of a job file, and has words that the error must contain.
FILES: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "unknown key": ({"optim__learning_rte": 1}, ("optim.learning_rte", "not a field")),
    "misspelt key": ({"data__max_lenght": 512}, ("data.max_lenght", "did you mean max_length?")),
    "unknown section": ({"optimizer": {"lr": 1}}, ("optimizer", "not a field")),
    "text for a number": ({"data__max_length": "long"}, ('data.max_length="long"', "integer")),
    "number for text": ({"name": 7}, ("name=7", "text")),
    "true for a number": ({"parallel__workers": True}, ("parallel.workers=true", "integer")),
    "list for a section": ({"optim": [1, 2]}, ("optim=[1, 2]", "section")),
    "unknown choice": ({"parallel__zero_stage": 7}, ("parallel.zero_stage=7", "0, 1, 2 or 3")),
    "negative rate": ({"optim__lr": -1.0}, ("optim.lr=-1.0", "above 0")),
    "rate that is not a number": ({"optim__lr": float("nan")}, ("optim.lr",)),
    "zero workers": ({"parallel__workers": 0}, ("parallel.workers=0", "at least 1")),
    "port out of range": ({"metrics__port": 70000}, ("metrics.port=70000", "65535")),
    "empty list of data": ({"data__train": []}, ("data.train", "at least 1")),
    "name with a slash": ({"name": "a/b"}, ('name="a/b"', "match")),
    "batch that does not divide": (
        {"optim__global_batch_size": 3},
        ("optim.global_batch_size=3", "multiple", "use 4"),
    ),
    "sequence parallelism that does not divide": (
        {"parallel__sequence_parallel_size": 3},
        ("parallel.sequence_parallel_size=3", "does not divide", "[1, 2]"),
    ),
    "parameters offloaded without partitioning": (
        {"parallel__zero_stage": 2, "parallel__offload_param": "cpu"},
        ("parallel.offload_param=cpu", "zero_stage: 3"),
    ),
    "parameters offloaded before the optimizer": (
        {"parallel__offload_param": "cpu"},
        ("offload_optimizer: cpu",),
    ),
    "flash attention on CPU": (
        {"parallel__device": "cpu", "model__attention": "flash"},
        ("model.attention=flash", "sdpa"),
    ),
    "saving of a later version": (
        {"checkpoint__asynchronous": True},
        ("checkpoint.asynchronous=true", "use false"),
    ),
    "storage by URI": ({"checkpoint__storage": "s3://bucket/runs"}, ("checkpoint.storage=s3://bucket/runs",)),
}


@pytest.mark.parametrize("kind", FILES)
def test_invalid_field(kind: str, tmp_path: Path) -> None:
    changes, words = FILES[kind]
    _write(tmp_path, job_text(tmp_path / "runs", **changes))
    for command in (("validate",), ("train",)):
        _assert_clear(orchestrator(*command, "job.yaml", cwd=tmp_path), 2, *words)
    assert not (tmp_path / "runs").exists()


TEXTS: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "empty": ("", ("empty", "name:")),
    "not a mapping": ("- a\n- b\n", ("list", "mapping")),
    "not YAML": ("name: [a\nmodel: }", ("not valid YAML", "job.yaml:2")),
    "not UTF-8": (b"name: \xff\xfe\n", ("UTF-8",)),
    "duplicate key": (
        "name: a\nname: b\nmodel: {path: m}\ndata: {train: [{path: d}]}\n",
        ("duplicate key name", "job.yaml:2"),
    ),
    "tag that would run code": ("name: !!python/object/apply:os.getcwd []\n", ("not valid YAML",)),
    "nothing that is required": (
        "optim: {lr: 1.0e-5}\n",
        ("name is required", "model is required", "data is required"),
    ),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_invalid_yaml(kind: str, tmp_path: Path) -> None:
    text, words = TEXTS[kind]
    _write(tmp_path, text)
    _assert_clear(orchestrator("train", "job.yaml", cwd=tmp_path), 2, *words)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("validate", "absent.yaml"), 2, ("absent.yaml", "cannot be read")),
        (("train", "absent.yaml"), 2, ("absent.yaml", "cannot be read")),
        (("train", "job.yaml", "--set", "optim.lr"), 2, ("--set optim.lr", "field.name=value")),
        (("train", "job.yaml", "--set", "optim.lrr=1"), 2, ("optim.lrr", "did you mean lr?")),
        (("train", "job.yaml", "--set", "data.train.5.path=x"), 2, ("data.train.5.path",)),
        (("export", "nowhere", "--to", "model"), 2, ("nowhere", "not a run directory")),
        (("report", "nowhere"), 2, ("nowhere", "report.json")),
    ],
)
def test_invalid_arguments(
    arguments: tuple[str, ...], code: int, words: tuple[str, ...], tmp_path: Path
) -> None:
    _write(tmp_path, job_text(tmp_path / "runs"))
    _assert_clear(orchestrator(*arguments, cwd=tmp_path), code, *words)


def test_all_errors_of_a_file_at_once(tmp_path: Path) -> None:
    changes = {"name": "a/b", "optim__lr": -1.0, "data__max_lenght": 1, "parallel__zero_stage": 9}
    _write(tmp_path, job_text(tmp_path / "runs", **changes))
    done = orchestrator("validate", "job.yaml", cwd=tmp_path)
    _assert_clear(done, 2, "4 problems", "name=", "optim.lr=", "data.max_lenght", "parallel.zero_stage=9")


def test_missing_files(tmp_path: Path) -> None:
    _write(
        tmp_path,
        job_text(
            tmp_path / "runs",
            data__train=[{"path": "absent.json"}],
            model={"path": "./no-model", "weights": "random"},
            eval={"data": [{"path": "also-absent.json"}]},
        ),
    )
    done = orchestrator("train", "job.yaml", cwd=tmp_path)
    _assert_clear(done, 2, "absent.json", "also-absent.json", "no-model")


def test_model_directory_without_config_json(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    _write(tmp_path, job_text(tmp_path / "runs", model={"path": "folder", "weights": "random"}))
    _assert_clear(orchestrator("train", "job.yaml", cwd=tmp_path), 2, "model.path", "config.json")


def test_storage_that_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    _write(tmp_path, job_text(tmp_path / "file" / "runs"))
    _assert_clear(
        orchestrator("train", "job.yaml", cwd=tmp_path), 3, "checkpoint.storage", "cannot be written"
    )
    assert (tmp_path / "file").read_text() == "in the way"


def test_port_that_is_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        _write(tmp_path, job_text(tmp_path / "runs", metrics__port=port))
        _assert_clear(orchestrator("train", "job.yaml", cwd=tmp_path), 3, f"metrics.port={port}", "free")


def test_dashboard_that_does_not_respond(tmp_path: Path) -> None:
    _write(tmp_path, job_text(tmp_path / "runs"))
    done = orchestrator("submit", "job.yaml", "--address", "http://127.0.0.1:9", cwd=tmp_path)
    _assert_clear(done, 3, "http://127.0.0.1:9", "--address")


def test_submit_with_paths_that_cannot_be_uploaded(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    changes = {
        "data__train": [{"path": "../rows.json"}],
        "checkpoint__storage": "runs",
        "model__path": "./model",
    }
    _write(tmp_path, job_text(tmp_path / "runs", **changes))
    done = orchestrator("submit", "job.yaml", "--address", "http://127.0.0.1:9", cwd=tmp_path)
    _assert_clear(done, 2, "../rows.json", "checkpoint.storage=runs", "model.path=./model")


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Callable[..., Finished]]:
    """Run a command that starts Ray, and check that no process is left."""
    marker = uuid.uuid4().hex

    def run(*arguments: str) -> Finished:
        return orchestrator(*arguments, cwd=tmp_path, TEST_MARKER=marker)

    yield run
    wait_until(lambda: not processes_of(f"TEST_MARKER={marker}"), 30, "all processes gone")


ROWS: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "malformed rows": (
        '{"instruction": "a", "output": "b"}\n{"instruction": "a"}\nnot json\n'
        '{"instruction": "a", "output": 3}\n[1]\n',
        ("4 problems", "line 2", "output is missing", "line 3", "not valid JSON", "line 4", "line 5"),
    ),
    "broken array": ('[{"instruction": "a", "output": "b"},', ("not valid JSON",)),
    "no rows": ("[]", ("no rows",)),
    "text that is not UTF-8": (b'{"instruction": "\xff", "output": "b"}\n', ("UTF-8",)),
}


@pytest.mark.ray
@pytest.mark.parametrize("kind", ROWS)
def test_invalid_rows(kind: str, tmp_path: Path, watched: Callable[..., Finished]) -> None:
    content, words = ROWS[kind]
    (tmp_path / "rows.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    _write(tmp_path, job_text(tmp_path / "runs", data__train=[{"path": "rows.json"}]))
    _assert_clear(watched("pack", "job.yaml"), 2, "rows.json", *words)
    folders = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert all(any(path.iterdir()) for path in folders), folders  # no empty directories are left


@pytest.mark.ray
def test_rows_that_all_exceed_max_length(tmp_path: Path, watched: Callable[..., Finished]) -> None:
    rows = [{"instruction": "word " * 100, "output": "word " * 100}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    changes = {"data__train": [{"path": "rows.json"}], "data__max_length": 32, "data__truncation": "drop"}
    _write(tmp_path, job_text(tmp_path / "runs", **changes))
    _assert_clear(watched("train", "job.yaml"), 2, "rows.json", "1 of 1", "max_length=32")


@pytest.mark.ray
def test_more_workers_than_the_cluster_has(tmp_path: Path, watched: Callable[..., Finished]) -> None:
    changes = {"parallel__workers": 512, "optim__global_batch_size": 512}
    _write(tmp_path, job_text(tmp_path / "runs", **changes))
    _assert_clear(watched("train", "job.yaml"), 3, "512", "parallel.workers")
    # The name of the job stays free for the corrected job.
    assert not (tmp_path / "runs").exists()


@pytest.mark.ray
def test_offload_that_exceeds_host_memory(tmp_path: Path, watched: Callable[..., Finished]) -> None:
    builtin = Path(__file__).resolve().parents[2] / "orchestrator" / "builtin" / "tiny-llama"
    shutil.copytree(builtin, tmp_path / "model")
    config = json.loads((builtin / "config.json").read_text())
    sizes = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126}  # Llama 3.1 405B
    heads = {"num_attention_heads": 128, "num_key_value_heads": 8, "head_dim": 128}
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, **sizes, **heads}))
    model = {"path": "./model", "weights": "random"}
    offloaded = {"parallel__offload_optimizer": "cpu", "parallel__offload_param": "cpu"}
    _write(tmp_path, job_text(tmp_path / "runs", model=model, parallel__zero_stage=3, **offloaded))
    words = ("GiB of memory each cannot be placed", "offloaded by 2 workers", "method.type: lora")
    _assert_clear(watched("train", "job.yaml"), 3, *words)
    assert not (tmp_path / "runs" / "run" / "attempts.jsonl").exists()


@pytest.mark.ray
def test_a_job_that_does_not_fit_is_refused_before_data_is_read(
    tmp_path: Path, watched: Callable[..., Finished]
) -> None:
    _write(tmp_path, job_text(tmp_path / "runs", data__max_length=4_194_304))
    done = watched("train", "job.yaml")
    _assert_clear(done, 3, "does not fit: ", "it would fit with (1) --set ", "data.max_length=", "--force")
    run = tmp_path / "runs" / "run"
    assert json.loads((run / "plan.json").read_text())["verdict"] == "does not fit"
    assert not (run / "data.json").exists()


@pytest.mark.ray
def test_dtype_that_the_device_does_not_support(tmp_path: Path, watched: Callable[..., Finished]) -> None:
    _write(tmp_path, job_text(tmp_path / "runs", model__dtype="fp16", parallel__device="cpu"))
    _assert_clear(watched("train", "job.yaml"), 2, "model.dtype=fp16", "fp32")
    assert not (tmp_path / "runs").exists()  # no run directory is left


@pytest.mark.ray
def test_tokenizer_without_chat_template(tmp_path: Path, watched: Callable[..., Finished]) -> None:
    builtin = Path(__file__).resolve().parents[2] / "orchestrator" / "builtin" / "tiny-llama"
    shutil.copytree(builtin, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    changes = {"model": {"path": "./model", "weights": "random"}, "data__chat_template": "chat"}
    _write(tmp_path, job_text(tmp_path / "runs", **changes))
    _assert_clear(watched("pack", "job.yaml"), 2, "data.chat_template=chat", "chat_template: alpaca")


@pytest.mark.ray
def test_model_without_weights_is_not_retried(tmp_path: Path, watched: Callable[..., Finished]) -> None:
    _write(tmp_path, job_text(tmp_path / "runs", model__weights="pretrained"))
    _assert_clear(watched("train", "job.yaml"), 2, "model.path=builtin/tiny-llama", "has no weights")
    assert not (tmp_path / "runs").exists()


@pytest.mark.ray
def test_loss_that_is_not_finite(tmp_path: Path, watched: Callable[..., Finished]) -> None:
    changes = {"optim__lr": 1e30, "optim__lr_scheduler": "constant", "optim__warmup_ratio": 0.0}
    _write(tmp_path, job_text(tmp_path / "runs", **changes))
    _assert_clear(watched("train", "job.yaml"), 4, "loss=nan", "at step 2", "lower optim.lr")


@pytest.mark.ray
def test_full_disk_keeps_the_last_checkpoint(tmp_path: Path, watched: Callable[..., Finished]) -> None:
    storage = tmp_path / "small"
    storage.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(storage)], check=False)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        _write(tmp_path, job_text(storage, checkpoint__every_steps=4))
        done = watched("train", "job.yaml")
        _assert_clear(done, 4, "checkpoint of step 8 cannot be written", "free some space")
        kept = [
            path.name
            for path in (storage / "run" / "checkpoints").iterdir()
            if (path / "manifest.json").exists()
        ]
        assert kept == ["step-00000004"]
        subprocess.run(["mount", "-o", "remount,size=400m", str(storage)], check=True)
        again = watched("train", "job.yaml", "--json")
        assert again.code == 0, again.err
        assert json.loads(again.out)["steps"] == 12
    finally:
        subprocess.run(["umount", "-l", str(storage)], check=True)


@pytest.mark.ray
def test_damaged_checkpoint_and_another_job(
    undisturbed_run: Observed, tmp_path: Path, watched: Callable[..., Finished]
) -> None:
    """Uses a copy of a finished run without its report, so that it is not finished."""
    storage = tmp_path / "runs"
    shutil.copytree(undisturbed_run.folder, storage / "run")
    (storage / "run" / "report.json").unlink()
    job = yaml.safe_load((storage / "run" / "job.yaml").read_text())
    job["checkpoint"]["storage"] = str(storage)
    job["metrics"]["port"] = 0
    _write(tmp_path, yaml.safe_dump(job))

    other = orchestrator("train", "job.yaml", "--set", "optim.lr=5e-4", cwd=tmp_path)
    _assert_clear(other, 2, "contains a run of another job", "optim.lr=0.0005", "another name")

    (saved,) = (storage / "run" / "checkpoints").glob("step-*")
    damaged = flip_a_bit(saved, "model.lm_head.weight")
    done = watched("train", "job.yaml")
    _assert_clear(done, 4, damaged.name, "is damaged: bytes", "model.lm_head.weight")
    assert "no whole checkpoint is left in" in done.err
    assert losses(storage / "run") == losses(undisturbed_run.folder), "nothing is lost"
    exported = orchestrator("export", "runs/run", "--to", "model", cwd=tmp_path)
    _assert_clear(exported, 4, damaged.name)
    assert not (tmp_path / "model").exists()


def test_run_directory_that_is_in_use(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "run"
    run_dir.mkdir(parents=True)
    sleeper = subprocess.Popen(["sleep", "120"])
    try:
        owner = {"owner": "x", "host": socket.gethostname(), "pid": sleeper.pid}
        (run_dir / "owner.json").write_text(json.dumps(owner))
        _write(tmp_path, job_text(tmp_path / "runs"))
        done = orchestrator("train", "job.yaml", cwd=tmp_path)
        _assert_clear(done, 3, f"process {sleeper.pid}", "change name in the job file")
    finally:
        sleeper.kill()
        sleeper.wait()

"""Log files of a run: complete, appended to, bounded in size, and without secrets."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import TrainingError
from orchestrator.run.run_log import driver_log, redacted, trim_log
from tests.conftest import ENVIRONMENT, ROOT


def test_the_driver_log_is_appended_to_and_contains_records_of_all_loggers(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with driver_log(tmp_path) as path:
            logging.getLogger("orchestrator.train.driver").info("%s start", text)
            logging.getLogger("some.library").warning("%s warning", text)
            logging.getLogger("some.library").debug("too much")
            loud = logging.getLogger("ray.train.v2")
            loud.setLevel(logging.INFO)  # as Ray and DeepSpeed set their own
            loud.info("the state of the controller")
            loud.setLevel(logging.NOTSET)
    logging.getLogger("orchestrator.train.driver").info("after the end")
    lines = path.read_text().splitlines()
    assert [line.split(": ", 1)[1] for line in lines] == [
        "first start",
        "first warning",
        "second start",
        "second warning",
    ]
    assert all(line[:2] == "20" for line in lines), "each line has a timestamp"


def test_a_run_continues_without_logs_if_they_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("in the way")
    with driver_log(tmp_path):
        logging.getLogger("orchestrator").info("not written anywhere")
    assert (tmp_path / "logs").read_text() == "in the way"


def test_secrets_are_replaced_by_the_names_of_their_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    with driver_log(tmp_path) as path:
        logging.getLogger("orchestrator").info("GET /?token=%s", "hf_0123456789")
        try:
            raise ValueError("no access with hf_0123456789")
        except ValueError:
            logging.getLogger("orchestrator").exception("failed")
    assert "hf_0123456789" not in path.read_text()
    assert "GET /?token=[HF_TOKEN]" in path.read_text()
    plain = {"HOME": "/root/home", "TOKEN_FILE_COUNT": "12", "WANDB_API_KEY": "abcdef0"}
    assert redacted("12 in /root/home by abcdef0", plain) == "12 in /root/home by [WANDB_API_KEY]"


@pytest.mark.process
def test_a_rank_log_captures_python_c_child_processes_and_loggers(tmp_path: Path) -> None:
    body = f"""
import logging, os, sys
from pathlib import Path
from orchestrator.run.run_log import rank_log
print("before", flush=True)
for attempt in (1, 2, 2):
    with rank_log(Path({str(tmp_path)!r}), 3, attempt):
        print("by print")
        os.write(1, b"by C\\n")
        os.write(2, b"by C on stderr\\n")
        subprocess = os.system("echo by a child")
        logging.getLogger("deepspeed").warning("by a logger")
print("after", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", body],
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == "before\nafter\n"
    assert done.stderr == ""
    assert sorted(os.listdir(tmp_path / "logs")) == ["rank-3.attempt-1.log", "rank-3.attempt-2.log"]
    first = (tmp_path / "logs" / "rank-3.attempt-1.log").read_text()
    for text in (
        "by print\n",
        "by C\n",
        "by C on stderr\n",
        "by a child\n",
        "WARNING deepspeed: by a logger\n",
    ):
        assert first.count(text) == 1
    assert (tmp_path / "logs" / "rank-3.attempt-2.log").read_text().count("by print\n") == 2


def test_a_large_log_is_trimmed_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("ab") as writer:
        for number in range(1000):
            writer.write(b"line %d\n" % number)
            writer.flush()
            trim_log(path, max_bytes=500, kept_bytes=100)
        writer.write(b"the last\n")
    lines = path.read_text().splitlines()
    assert path.stat().st_size < 700
    assert lines[0].startswith("(older lines were dropped: the log had ")
    assert lines[-2:] == ["line 999", "the last"]


def test_logs_of_old_attempts_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    for attempt in range(1, 15):
        (folder / f"rank-0.attempt-{attempt}.log").write_text("x")
    (folder / "notes-of-mine.log").write_text("x")
    with driver_log(tmp_path):
        pass
    kept = {int(path.name.split("-")[2].split(".")[0]) for path in folder.glob("rank-*")}
    assert kept == set(range(5, 15))
    assert (folder / "notes-of-mine.log").exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            TrainingError("the loss is not a number"),
            "ERROR orchestrator.run.run_log: training error: the loss",
        ),
        (KeyboardInterrupt(), "WARNING orchestrator.run.run_log: stopped by Ctrl-C"),
        (KeyError("a fault"), "Traceback (most recent call last)"),
    ],
)
def test_the_driver_log_records_how_a_run_ended(error: BaseException, words: str, tmp_path: Path) -> None:
    with pytest.raises(type(error)), driver_log(tmp_path) as path:
        raise error
    assert words in path.read_text()

"""End-to-end demo of `make demo`: train, scrape metrics, export, reload the model, and check each step.

Run as `python -m orchestrator.cli.demo`. It writes to runs/demo, or to the first of runs/demo-2, ... that
does not exist.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, cast

from orchestrator.package_data import resource

if TYPE_CHECKING:
    from torch import Tensor

_STORAGE = Path("runs")
_SERIES = re.compile(r"^(orchestrator_(?:tgs|tflops_model)\{.*rank=\"(\d+)\".*\}) (\S+)$", re.MULTILINE)


def main() -> int:
    """Run the demo; return 0 if every step succeeded."""
    storage = _new_folder(_STORAGE)
    job = resource("launch/jobs/quickstart.yaml")
    command = [
        sys.executable,
        "-m",
        "orchestrator",
        "train",
        str(job),
        "--set",
        f"checkpoint.storage={storage}",
    ]
    _print(f"$ orchestrator train {job.name} --set checkpoint.storage={storage}")
    started = time.monotonic()
    process = subprocess.Popen(command)
    try:
        # The endpoint uses the first free port; metrics.json in the run directory has its address.
        seen = _scrape_while_running(process, storage / "quickstart" / "metrics.json")
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)
    if process.returncode:
        return process.returncode
    if len(seen) < 4:
        _print("the metrics endpoint did not serve TGS and TFLOP/s of both ranks during the run")
        return 1
    _print(f"\n{_reload(storage / 'quickstart' / 'export')}")
    _print(f"demo finished in {time.monotonic() - started:.0f} s")
    return 0


def _new_folder(folder: Path) -> Path:
    """Return a folder that does not exist yet, so that earlier demos are kept."""
    names = chain(["demo"], (f"demo-{number}" for number in count(2)))
    return next(folder / name for name in names if not (folder / name).exists())


def _scrape_while_running(process: subprocess.Popen[bytes], metrics_file: Path) -> dict[str, str]:
    """Scrape the endpoint until it serves both ranks, print the series once, and wait for the run."""
    seen: dict[str, str] = {}
    while process.poll() is None:
        time.sleep(0.5)
        if len(seen) >= 4:
            continue
        try:
            url = f"http://{json.loads(metrics_file.read_text(encoding='utf-8'))['target']}/metrics"
            with urllib.request.urlopen(url, timeout=2) as response:
                text = response.read().decode()
        except (OSError, ValueError):  # not open yet, or already closed
            continue
        seen = {series: value for series, _, value in _SERIES.findall(text)}
        if len(seen) >= 4:
            _print(f"{url} serves, among other series:")
            for series, value in seen.items():
                _print(f"{series} {value}")
    return seen


def _reload(folder: Path) -> str:
    """Load the exported model with transformers, and generate from a prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(  # a `BatchEncoding`, because of return_dict
        [{"role": "user", "content": "Name three primary colors."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    tensors = cast("Mapping[str, Tensor]", prompt)
    output = model.generate(**tensors, max_new_tokens=24, do_sample=False)  # type: ignore[misc, arg-type]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    text = tokenizer.decode(output[0, tensors["input_ids"].shape[1] :], skip_special_tokens=True)
    return f"reloaded {folder}: {parameters:,} parameters; after so few steps it generates: {text!r}"


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

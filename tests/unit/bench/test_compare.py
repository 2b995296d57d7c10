"""A comparison reports a difference only if it exceeds the variation between steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from orchestrator.bench import results
from orchestrator.bench.compare import compare, difference
from orchestrator.errors import SpecError
from tests.unit.bench.rows import row, without_figures


def steps(seed: int, median: float, count: int = 60, noise: float = 0.05) -> list[float]:
    found: list[float] = (median * (1 + noise * np.random.default_rng(seed).standard_normal(count))).tolist()
    return found


def test_a_clear_difference_is_found_with_its_size() -> None:
    found = difference(steps(0, 100.0), steps(1, 110.0))
    assert found.low is not None
    assert found.high is not None
    assert 1.0 < found.low < 1.1 < found.high
    assert found.verdict.startswith("B is ")
    assert found.verdict.endswith("% higher")
    assert difference(steps(0, 100.0), steps(1, 90.0)).verdict.endswith("% lower")


def test_runs_of_the_same_kind_are_within_the_noise_as_often_as_promised() -> None:
    verdicts = [difference(steps(2 * n, 100.0), steps(2 * n + 1, 100.0)).verdict for n in range(100)]
    assert verdicts.count("within the noise") >= 88, (
        "95 % are promised; 88 of 100 or fewer in 1 of 1,000 tries"
    )


def test_a_drift_that_neighbouring_steps_share_widens_the_interval() -> None:
    walk = np.repeat(np.random.default_rng(3).standard_normal(16), 4)
    shared = (100.0 * (1 + 0.05 * walk)).tolist()
    mixed = np.random.default_rng(4).permutation(shared).tolist()

    def width(values: list[float]) -> float:
        found = difference(values, steps(5, 100.0, noise=1e-6))
        assert found.low is not None
        assert found.high is not None
        return found.high - found.low

    assert width(shared) > 1.2 * width(mixed)


def test_too_few_steps_give_no_verdict() -> None:
    found = difference([1.0] * 4, [2.0] * 50)
    assert (found.ratio, found.low, found.verdict) == (2.0, None, "not known: fewer than 5 steps")


def write_run(folder: Path, tgs: list[float], peak: float) -> Path:
    folder.mkdir()
    lines = [
        {"step": n + 1, "attempt": 1, "tgs": value, "step_seconds": 100.0 / value, "memory_peak_bytes": peak}
        for n, value in enumerate(tgs)
    ]
    (folder / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_two_runs(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [1.0, 1.0, *steps(0, 100.0)], 2.0**30)
    b = write_run(tmp_path / "b", [1.0, 1.0, *steps(1, 150.0)], 3 * 2.0**30)
    found = compare(a, b, warmup_steps=2)
    assert [column.name for column in found.columns][:3] == ["quantity", "unit", "A"]
    lines = {line[0]: line for line in found.rows}
    assert lines["TGS"][-1] == f"B is {lines['TGS'][4] - 1:.1%} higher"  # type: ignore[operator]
    assert str(lines["step"][-1]).endswith("% lower")
    assert lines["peak allocated"][2:5] == (1024.0, 3072.0, 3.0)
    assert lines["peak allocated"][-1] == "one reading each"


def test_two_sweeps_by_the_cells_that_both_ran(tmp_path: Path) -> None:
    for name, lengths in (("a", (64, 128)), ("b", (128, 256))):
        (tmp_path / name).mkdir()
        for length in lengths:
            results.append(tmp_path / name, row(f"{name}{length}", {"data.max_length": length}))
        results.append(tmp_path / name, without_figures("out_of_memory", name, {"data.max_length": 512}))
    found = compare(tmp_path / "a", tmp_path / "b", warmup_steps=0)
    assert {line[0] for line in found.rows} == {"max_length=128"}
    assert "2 cells ran in one of the two only" in found.notes[-1]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [1.0] * 3, 1.0)
    with pytest.raises(SpecError, match="more than 3 steps"):
        compare(a, a, warmup_steps=3)
    (tmp_path / "b").mkdir()
    results.append(tmp_path / "b", row("b"))
    with pytest.raises(SpecError, match="no cell in common"):
        compare(a, tmp_path / "b", warmup_steps=0)

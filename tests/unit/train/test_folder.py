"""A run is held to the data that it began with."""

from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.train.folder import DATA, require_same_data
from orchestrator.train.recorder import ATTEMPTS

OLD, NEW, HELD_OUT = Path("cache/plan-a"), Path("cache/plan-b"), Path("cache/plan-c")


def test_data_may_change_until_the_run_has_begun(tmp_path: Path) -> None:
    require_same_data(tmp_path, OLD, None)
    require_same_data(tmp_path, NEW, HELD_OUT)
    assert "plan-b" in (tmp_path / DATA).read_text()


def test_a_run_goes_on_with_the_data_that_it_began_with(tmp_path: Path) -> None:
    require_same_data(tmp_path, OLD, HELD_OUT)
    (tmp_path / ATTEMPTS).write_text("{}\n")
    require_same_data(tmp_path, Path("elsewhere") / OLD.name, HELD_OUT)
    with pytest.raises(SpecError, match=r"data\.train of the run .* changed since it began"):
        require_same_data(tmp_path, NEW, HELD_OUT)
    with pytest.raises(SpecError, match=r"data\.train and data\.eval"):
        require_same_data(tmp_path, NEW, None)
    assert "plan-a" in (tmp_path / DATA).read_text()

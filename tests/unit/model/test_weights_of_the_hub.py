"""The driver checks a hub model that is cached, and leaves one that is not cached to the workers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from orchestrator.config.schema import ModelSpec
from orchestrator.errors import SpecError
from orchestrator.model.build import build_model, require_supported, stored_config
from orchestrator.model.stored_weights import weight_files
from tests.unit.model.damage import SECOND, STAGE_2, configure, job, shard


@pytest.fixture
def hub(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a model in the hub's cache layout, with the hub offline, and return its snapshot folder."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return shutil.copytree(whole, repository / "snapshots" / ("0" * 40))


@pytest.mark.parametrize("layout", ["one file", "shards"])
def test_a_hub_model_is_looked_at_where_it_is_cached(layout: str, hub: Path) -> None:
    if layout == "shards":
        shard(hub)
    named = job(hub).model_copy(update={"model": ModelSpec(path="org/name")})
    config = stored_config(named.model)
    assert {file.parent for file in weight_files(named.model, config, download=False) or ()} == {hub}
    require_supported(named)
    build_model(named, torch.float32, STAGE_2)
    configure(num_hidden_layers=3)(hub)
    with pytest.raises(SpecError, match=r"model\.path=org/name lacks 9 of the tensors"):
        require_supported(named)
    with pytest.raises(SpecError, match=r"model\.path=org/name lacks 9 of the tensors"):
        build_model(named, torch.float32, STAGE_2)


@pytest.mark.parametrize("lost", ["all", "a shard"])
def test_a_hub_model_that_is_not_cached_is_left_to_the_workers(lost: str, hub: Path) -> None:
    shard(hub)
    for file in hub.glob("*.safetensors*" if lost == "all" else SECOND):
        file.unlink()
    named = job(hub).model_copy(update={"model": ModelSpec(path="org/name")})
    require_supported(named)
    with pytest.raises(SpecError, match=r"model\.path=org/name "):
        build_model(named, torch.float32, STAGE_2)

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.invariant import material


@dataclass(frozen=True)
class Material:
    """Folders of the tiny models (untied and tied embeddings) and of the token stores."""

    model: Path
    tied: Path
    training: Path
    held_out: Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Material:
    home = tmp_path_factory.mktemp("material")
    found = Material(home / "model", home / "tied", home / "training", home / "held-out")
    material.write_model(found.model)
    material.write_model(found.tied, tie_word_embeddings=True)
    material.write_documents(found.training, 68, seed=1)
    material.write_documents(found.held_out, 13, seed=2)
    return found

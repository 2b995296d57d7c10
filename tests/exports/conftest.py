"""One run and export of each kind, made once a session."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.export.run_exports import export_run
from tests.exports import runs
from tests.exports.compute import IDS

SEED = int(os.environ.get("ORCHESTRATOR_EXPORT_SEED", "0"))
LORA: dict[str, Any] = {"type": "lora", "rank": 4, "alpha": 8.0}


@dataclass(frozen=True)
class Case:
    """How a run was made and exported."""

    base: Callable[[Path], Path]
    method: dict[str, Any]
    options: dict[str, Any]


def _plain(family: str = "llama", **changes: Any) -> Callable[[Path], Path]:
    return lambda folder: runs.write_base(folder, family, **changes)


def _published(folder: Path) -> Path:
    return runs.as_transformers_4_writes(runs.write_base(folder))


CASES = {
    "full": Case(_published, {}, {}),
    "full of transformers 5": Case(_plain(), {}, {}),
    "tied": Case(_plain(tie_word_embeddings=True), {}, {}),
    "sharded": Case(_plain(), {}, {"max_shard_bytes": 100_000}),
    "tied and sharded": Case(_plain("qwen3"), {}, {"max_shard_bytes": 100_000}),
    "remote code": Case(lambda folder: runs.with_own_code(runs.write_base(folder)), {}, {}),
    "lora": Case(_published, LORA, {}),
    "lora with embeddings": Case(_published, {**LORA, "train_embeddings": True}, {}),
    "merged": Case(_published, LORA, {"merge": True}),
    "merged, tied and sharded": Case(_plain("qwen3"), LORA, {"merge": True, "max_shard_bytes": 100_000}),
    "merged from nf4": Case(_plain(), {**LORA, "quantization": "nf4"}, {"merge": True}),
    **{
        family: Case(_plain(family), {}, {})
        for family in ("gpt_neox", "phi", "gemma3_text", "mixtral", "gpt2")
    },
}


@dataclass(frozen=True)
class Exported:
    """An export, the base model of its run, and the logits of the model in its checkpoint."""

    name: str
    folder: Path
    base: Path
    run: runs.Made
    logits: Any
    answer: Any

    @property
    def task(self) -> dict[str, Any]:
        """The arguments of `compute.answer`."""
        is_adapter = (self.folder / "adapter_config.json").exists()
        trust = (self.base / "modeling_own.py").exists()
        return {"folder": str(self.folder), "base": str(self.base) if is_adapter else None, "trust": trust}


@pytest.fixture(scope="session")
def shared_dir() -> Iterator[Path]:
    """A directory that other users can enter, unlike those of pytest."""
    with tempfile.TemporaryDirectory(prefix="orchestrator-exports-") as root:
        Path(root).chmod(0o755)
        yield Path(root)


@pytest.fixture(scope="session")
def exported(shared_dir: Path) -> dict[str, Exported]:
    """Export a run of each kind with random sizes, readable by everyone."""
    import torch

    root = shared_dir
    draw = random.Random(SEED)
    exports = {}
    before = os.umask(0o022)
    try:
        for number, (name, case) in enumerate(CASES.items()):
            base = case.base(root / f"base-{number}")
            method = {"rank": draw.choice([2, 4, 8])} if case.method else {}
            made = runs.write_run(root / "runs" / f"run-{number}", base, method={**case.method, **method})
            done = export_run(made.folder, root / f"export-{number}", **case.options)
            ids = torch.tensor([[token % made.model.config.vocab_size for token in IDS]])
            with torch.no_grad():
                made.model.set_attn_implementation("eager")
                logits = made.model(ids, use_cache=False).logits[0]
            exports[name] = Exported(name, root / f"export-{number}", base, made, logits, done)
    finally:
        os.umask(before)
    return exports

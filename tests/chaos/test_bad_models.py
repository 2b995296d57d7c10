"""Models that do not match their files or their data are an error before workers start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import orchestrator.builtin as builtin
from tests.conftest import Finished, job_text, orchestrator, step_rows

pytestmark = pytest.mark.ray
SHIPPED = Path(builtin.__file__).parent / "tiny-llama"
SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


def write_model(folder: Path, family: str, **fields: Any) -> None:
    """Write a tiny model of a family with the builtin tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    tokenizer.save_pretrained(folder)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **{**SIZES, **fields})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def train(folder: Path, **changes: Any) -> Finished:
    text = job_text(folder / "runs", model={"path": "model"}, eval=None, **changes)
    (folder / "job.yaml").write_text(text)
    return orchestrator("train", "job.yaml", cwd=folder)


def assert_refused(done: Finished, folder: Path, *words: str) -> None:
    assert done.code == 2, done.err[-2000:]
    problem = done.err[done.err.index("job file error: ") :]
    for word in words:
        assert word in problem
    assert step_rows(folder / "runs" / "run") == []
    assert not (folder / "runs" / "run" / "workers.json").exists()


def test_a_missing_weight_is_an_error_before_workers_start(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "llama")
    file, name = tmp_path / "model" / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    assert_refused(train(tmp_path), tmp_path, "model.path=", "lacks 1 of", name, "copy the model again")


def test_tokens_beyond_the_embedding_are_an_error_before_workers_start(tmp_path: Path) -> None:
    """Warnings about a balance loss and about max_position_embeddings are logged first."""
    write_model(
        tmp_path / "model", "mixtral", num_local_experts=2, output_router_logits=True,
        router_aux_loss_coef=10.0,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|think|>"]})
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"instruction": f"Say {number}.", "output": f"<|think|> {number}"} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = train(tmp_path, data={"train": [{"path": "rows.jsonl"}], "max_length": 512})
    assert_refused(
        done, tmp_path, "embeds 2048 tokens", "reach 2048", "rows.jsonl", "model.resize_embeddings: true"
    )
    for line in ("asks for a balance loss", "is above max_position_embeddings=256"):
        assert done.out.count(line) == 1

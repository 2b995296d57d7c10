"""The driver rejects a model that cannot be trained exactly, before it reads data."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster.topology import Node
from orchestrator.config.schema import DataSpec, JobSpec, ModelSpec, OptimSpec, ParallelSpec, SourceSpec
from orchestrator.errors import SpecError
from orchestrator.train import driver


@pytest.mark.parametrize(
    ("family", "changes", "saving", "reason"),
    [
        ("gpt_oss", {"num_local_experts": 2}, {}, "attention sinks"),
        ("gemma2", {}, {"loss_tile_tokens": 8}, "loss_tile_tokens=8 cannot be used with Gemma2ForCausalLM"),
        ("qwen3_moe", {}, {"mlp_tile_tokens": 8}, "mlp_tile_tokens=8 cannot be used with Qwen3Moe"),
        ("llama", {"max_position_embeddings": 32, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0,
         "rope_theta": 1e4}}, {}, "data.max_length of at most 32"),
    ],
)  # fmt: skip
def test_a_model_is_refused_before_data_are_prepared(
    family: str,
    changes: dict[str, Any],
    saving: dict[str, Any],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(
        family, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, intermediate_size=32, vocab_size=64, pad_token_id=0, **changes,
    ).save_pretrained(tmp_path)  # fmt: skip
    job = JobSpec(
        name="j",
        model=ModelSpec(path=str(tmp_path), weights="random", **saving),
        data=DataSpec(train=(SourceSpec(path="d"),), max_length=64),
        parallel=ParallelSpec(workers=1),
        optim=OptimSpec(global_batch_size=1),
    )
    prepared: list[Any] = []
    monkeypatch.setattr(driver, "prepare_data", lambda *arguments: prepared.append(arguments))
    node = Node("1", "10.0.0.1", "n1", 4.0, 0.0, 0)
    monkeypatch.setattr(driver.ray_session, "live_nodes", lambda: (node,))
    start = driver._Start(tmp_path, None, lambda _: None, None, False, 0.0)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=reason):
        driver._train(job, start)
    assert not prepared

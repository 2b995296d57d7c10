"""Models of published dimensions with random weights, for tests and measurements on GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.builtin import __file__ as builtin

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5}
DIMENSIONS: dict[str, dict[str, Any]] = {
    # config.json of Qwen/Qwen2-0.5B
    "qwen2-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
    },
    # config.json of meta-llama/Llama-3.2-1B, without the scaling of its rotary embedding
    "llama3.2-1b": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
    },
    # config.json of meta-llama/Llama-3.2-3B, without the scaling of its rotary embedding
    "llama3.2-3b": {
        **_LLAMA,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
    },
}


def write_model(folder: Path, name: str) -> Path:
    """Write config.json with the dimensions of a model, and the built-in tokenizer; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in (Path(builtin).parent / "tiny-llama").iterdir():
        if file.is_file() and file.name != "config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(DIMENSIONS[name]), encoding="utf-8")
    return folder

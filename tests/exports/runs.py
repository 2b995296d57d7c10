"""Make finished runs in one process: a base model, a checkpoint, and the model with its weights.

A checkpoint of ZeRO-0 is one file, so it can be written without Ray or a process group. Exports of ZeRO-1 to
3 and of real training are tested in tests/invariant.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import orchestrator.builtin
from orchestrator.config import loader
from orchestrator.config.schema import JobSpec
from orchestrator.model.adapters import adapt
from orchestrator.model.base_model_id import BASE_MODEL_FILE, identity
from orchestrator.model.build import base_model
from tests.support.checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = Path(orchestrator.builtin.__file__).parent / "tiny-llama"
SIZES = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
GENERATION = {
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "repetition_penalty": 1.05,
}
_LAYERS = {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 7.0e5}}
_LAYERS |= {"sliding_attention": {"rope_type": "default", "rope_theta": 3.0e4}}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {**LLAMA3, "rope_theta": 5.0e5}},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 8, "rope_parameters": {"rope_theta": 1.0e6}},
    "gpt_neox": {"rope_parameters": {"rope_theta": 3.0e4, "partial_rotary_factor": 0.5}},
    "phi": {"rope_parameters": {"rope_theta": 3.0e4, "partial_rotary_factor": 0.25}},
    "gemma3_text": {
        "head_dim": 8,
        "rope_parameters": _LAYERS,
        "layer_types": list(_LAYERS),
        "sliding_window": 16,
    },
    "mixtral": {"num_local_experts": 4, "rope_parameters": {"rope_theta": 3.0e4}},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}
"""Settings by model type, each with a rotary embedding that differs from the type's defaults."""
_CONFIGURATION = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own_llama"

    def __init__(self, logit_scale=1.0, **others):
        super().__init__(**others)
        self.logit_scale = logit_scale
"""
_MODELING = """
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig
from .scaling_own import scale


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *inputs, **named):
        found = super().forward(*inputs, **named)
        found.logits = scale(found.logits, self.config)
        return found
"""
_SCALING = """
def scale(logits, config):
    return logits * config.logit_scale
"""


@dataclass(frozen=True)
class Made:
    """A run directory, and the model with the weights of its newest checkpoint."""

    folder: Path
    job: JobSpec
    model: Any


def write_base(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """Write a tiny random model as transformers 5 does, with tokenizer and generation config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(
        family, **{**SIZES, "initializer_range": 0.2, **FAMILIES[family], **changes}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TOKENIZER / file, folder / file)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    for file in folder.iterdir():  # safetensors writes mode 600; published models are readable
        file.chmod(0o644)
    return folder


def as_transformers_4_writes(folder: Path) -> Path:
    """Rewrite config.json and tokenizer_config.json of a Llama model as transformers 4 writes them."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "4.45.0"}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    settings.pop("backend")
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def with_own_code(folder: Path) -> Path:
    """Turn a Llama model into one with its own code in its directory, which scales the logits."""
    config = json.loads((folder / "config.json").read_text())
    names = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    own = {
        "model_type": "own_llama",
        "architectures": ["OwnForCausalLM"],
        "auto_map": names,
        "logit_scale": 3.0,
    }
    (folder / "config.json").write_text(json.dumps({**config, **own}))
    code = {"configuration_own": _CONFIGURATION, "modeling_own": _MODELING, "scaling_own": _SCALING}
    for name, text in code.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def write_run(folder: Path, base: Path, steps: tuple[int, ...] = (2, 4), **sections: Any) -> Made:
    """Write a finished run of a base model whose weights, or adapter, were changed at random.

    Args:

        folder: The run directory, STORAGE/NAME.
        base: Directory of the base model.
        steps: Steps of the checkpoints, each with different weights.
        **sections: Sections of the job that replace defaults.
    """
    model = {"path": str(base), "trust_remote_code": (base / "modeling_own.py").exists()}
    data = {"train": [{"path": "builtin/alpaca_sample", "sample": 64}], "max_length": 256}
    document = {
        "name": folder.name,
        "model": model | sections.pop("model", {}),
        "data": data | sections.pop("data", {}),
        "checkpoint": {"storage": str(folder.parent)},
        **sections,
    }
    job = JobSpec.model_validate_json(json.dumps(document))
    folder.mkdir(parents=True)
    (folder / "job.yaml").write_text(loader.dump(job))
    (folder / "deepspeed.json").write_text(
        json.dumps({name: {"enabled": False} for name in ("bf16", "fp16")})
    )
    (folder / BASE_MODEL_FILE).write_text(json.dumps(identity(job)))
    built = base_model(job, torch.float32)
    if job.method.type == "lora":
        built = adapt(built, job.method, torch.float32, seed=1)
    for step in steps:
        _move(built, step)
        write_checkpoint(folder / "checkpoints", step, trained_state(built))
    rows = [
        {"step": n, "attempt": 0, "loss": 5.0 - n / 4, "tokens": 100, "trained_tokens": 60}
        for n in range(1, 7)
    ]
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluations = [{"step": n, "attempt": 0, "evaluation_loss": 6.0 - n / 4} for n in (2, 4, 6)]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
    return Made(folder, job, built.eval())


def _write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _move(model: Any, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def trained_state(model: Any) -> dict[str, torch.Tensor]:
    """Return the state dict of a model without frozen weights, as a checkpoint has it."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}

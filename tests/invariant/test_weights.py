"""Weight files that do not match the model are rejected on every rank, under every ZeRO stage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.invariant import material
from tests.invariant.group import Outcome, run_group

pytestmark = pytest.mark.distributed

UP = "model.layers.1.mlp.up_proj.weight"
WORDS = {
    "whole": None,
    "tied": None,
    "experts": None,
    "bare": None,
    "lost": f"lacks 1 of the tensors of LlamaForCausalLM ({UP})",
    "extra": "has 1 tensor that LlamaForCausalLM has no place for (score.weight)",
    "reshaped": f"has 1 tensor of another shape than LlamaForCausalLM ({UP} is",
    "lost-on-1": f"lacks 1 of the tensors of LlamaForCausalLM ({UP})",
}
"""Expected error by kind of weight files, or None if they load; in `lost-on-1` only rank 1 lacks a tensor.

`experts` stores the experts of a layer as separate tensors, which loading merges. `bare` lacks the prefix
`model.` and contains `inv_freq`, a buffer that current versions compute.
"""
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"type": "lora"},
    "nf4": {"type": "lora", "quantization": "nf4"},
}


def _write(home: Path) -> None:
    material.write_model(home / "whole")
    material.write_model(home / "tied", tie_word_embeddings=True)
    material.write_model_of("mixtral", home / "experts", num_local_experts=4, num_experts_per_tok=2)
    shutil.copytree(home / "whole", home / "bare")
    tensors = load_file(home / "whole" / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(bare, home / "bare" / "model.safetensors", metadata={"format": "pt"})
    for kind in ("lost", "extra", "reshaped"):
        folder = shutil.copytree(home / "whole", home / kind)
        tensors = load_file(folder / "model.safetensors")
        if kind == "extra":
            tensors["score.weight"] = tensors[UP].clone()
        elif kind == "lost":
            del tensors[UP]
        else:
            tensors[UP] = tensors[UP][:-1].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(home / "whole", home / "lost-on-1" / "0")
    shutil.copytree(home / "lost", home / "lost-on-1" / "1")


def _jobs(home: Path) -> dict[str, Any]:
    jobs = {}
    for kind in WORDS:
        folder = home / kind / "{rank}" if kind == "lost-on-1" else home / kind
        for stage in range(4):
            for name, method in METHODS.items() if kind in ("whole", "lost") else [("full", {})]:
                jobs[f"{kind} {name} zero{stage}"] = material.job(
                    folder, 2, {"zero_stage": stage}, method=method
                )
    return jobs


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    home = tmp_path_factory.mktemp("weights")
    _write(home)
    task = {"name": "refusals", "action": "refuse_to_build", "jobs": _jobs(home)}
    return run_group(home / "group", 2, [task])["refusals"]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("kind", WORDS)
def test_files_are_refused_on_every_rank_or_on_none(kind: str, stage: int, outcome: Outcome) -> None:
    words = WORDS[kind]
    of_kind = [name for name in outcome.answer["problems"] if name.split()[::2] == [kind, f"zero{stage}"]]
    assert len(of_kind) == (len(METHODS) if kind in ("whole", "lost") else 1)
    for rank in outcome.ranks:
        for name in of_kind:
            problems = rank["problems"][name]
            assert problems is None if words is None else words in problems[0]

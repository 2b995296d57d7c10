"""The exported model has, with transformers, the evaluation loss that the run reported."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.config.schema import SourceSpec
from orchestrator.data.chat_template import encode
from orchestrator.data.formats import parse
from orchestrator.data.readers import locate
from orchestrator.data.token_cache import is_trained
from tests.conftest import Observed

pytestmark = pytest.mark.ray


def test_the_exported_model_has_the_evaluation_loss_of_the_run(undisturbed_run: Observed) -> None:
    folder = undisturbed_run.folder / "export"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    total, trained = 0.0, 0
    (file,) = locate(SourceSpec(path="builtin/alpaca_sample_eval"))
    rows = [parse(value, "alpaca") for block in file.blocks() for value in block.values]
    for row in encode(rows, tokenizer, "chat"):
        ids = torch.from_numpy(row.tokens.astype("int64"))[None]
        targets = torch.from_numpy(is_trained(row.turn, "response"))[1:]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1][targets]
        total += functional.cross_entropy(logits, ids[0, 1:][targets], reduction="sum").item()
        trained += int(targets.sum())
    assert undisturbed_run.report["evaluation_loss"] == pytest.approx(total / trained, rel=1e-5)

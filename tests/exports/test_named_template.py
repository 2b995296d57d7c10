"""A base model trained with a chat template by name is exported with the template and its tokens."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.config.chat_templates import NAMED
from tests.conftest import job_text, orchestrator


@pytest.mark.ray
def test_the_export_has_the_template_its_tokens_and_its_end(tmp_path: Path) -> None:
    text = job_text(
        tmp_path / "runs",
        model={"path": "builtin/tiny-llama", "weights": "random", "resize_embeddings": True},
        data={"train": [{"path": "builtin/alpaca_sample"}], "chat_template": "chatml", "max_length": 128},
        parallel={"workers": 2, "zero_stage": 3},
        optim={"lr": 1e-3, "global_batch_size": 2, "max_steps": 2},
    )
    (tmp_path / "job.yaml").write_text(text)
    done = orchestrator("train", "job.yaml", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    export = tmp_path / "runs" / "run" / "export"
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert tokenizer.chat_template == NAMED["chatml"].source
    ends = [tokenizer.convert_tokens_to_ids(token) for token in NAMED["chatml"].tokens]
    assert tokenizer.eos_token == "<|im_end|>"
    assert ends == [2048, 2049]
    model = AutoModelForCausalLM.from_pretrained(export)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 2050
    assert ends[1] in json.loads((export / "generation_config.json").read_text())["eos_token_id"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert prompt["input_ids"].max() == ends[1]
    assert model(**prompt).logits.shape[-1] == 2050


@pytest.mark.ray
def test_without_rows_for_its_tokens_the_template_is_refused_with_the_remedy(tmp_path: Path) -> None:
    data = {"train": [{"path": "builtin/alpaca_sample"}], "chat_template": "chatml", "max_length": 128}
    (tmp_path / "job.yaml").write_text(job_text(tmp_path / "runs", data=data))
    done = orchestrator("train", "job.yaml", cwd=tmp_path)
    assert done.code == 2, done.err
    assert "embeds 2048 tokens, and ids in the data reach 2049" in done.err
    assert "set model.resize_embeddings: true" in done.err

"""Token ids and positions are checked against the embeddings of a model, which can be resized."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orchestrator.arch.hf_config import load_config_json, resized
from orchestrator.arch.model_dims import ModelDims
from orchestrator.arch.parameters import parameter_count
from orchestrator.config.schema import JobSpec, ModelSpec
from orchestrator.config.validation import broken_rules
from orchestrator.errors import SpecError
from orchestrator.model.base_model_id import identity
from orchestrator.model.build import (
    base_model,
    build_model,
    build_on_meta,
    load_config,
    require_supported,
    stored_config,
)
from orchestrator.model.compatibility import balance_note, length_note, model_notes
from orchestrator.model.vocabulary import tokenizer_rows, vocabulary_notes, vocabulary_problem
from tests.invariant import material
from tests.invariant.material import VOCABULARY

TOKENS = VOCABULARY + 3
STAGE_2 = {"zero_optimization": {"stage": 2}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    material.write_model(folder)
    material.write_tokenizer(folder, TOKENS)
    return folder


def job(folder: Path, **sections: Any) -> JobSpec:
    document = material.job(folder, 1, {"zero_stage": 2}, **sections)
    return JobSpec.model_validate_json(json.dumps(document))


def spec(folder: Path, **fields: Any) -> ModelSpec:
    return ModelSpec(path=str(folder), **fields)


# Token ids


def test_ids_beyond_the_embedding_are_refused_with_the_remedy(model: Path) -> None:
    largest = {"a.json": 90, "b.json": VOCABULARY, "c.json": VOCABULARY + 1, "none.json": -1}
    problem = vocabulary_problem(spec(model), load_config(spec(model)), largest)
    assert problem is not None
    for word in ("embeds 160 tokens", "reach 161", "c.json and 1 more", "resize_embeddings: true"):
        assert word in problem
    grown = spec(model, resize_embeddings=True)
    assert vocabulary_problem(grown, load_config(grown), largest) is None


@pytest.mark.parametrize("resize", [False, True])
def test_ids_that_the_tokenizer_does_not_have_either_are_not_to_be_resized_for(
    resize: bool, model: Path
) -> None:
    mine = spec(model, resize_embeddings=resize)
    problem = vocabulary_problem(mine, load_config(mine), {"rows.jsonl": TOKENS})
    assert problem is not None
    assert "reach 163 (rows.jsonl)" in problem
    assert "does not have either" in problem
    assert "resize_embeddings" not in problem


def test_the_last_row_of_the_embedding_may_be_used(model: Path) -> None:
    assert vocabulary_problem(spec(model), load_config(spec(model)), {"rows": VOCABULARY - 1}) is None


def test_a_larger_tokenizer_whose_tokens_are_not_used_is_told_of_in_a_line(model: Path) -> None:
    config = load_config(spec(model))
    (note,) = vocabulary_notes(spec(model), config, config)
    assert "has 163 tokens and the model embeds 160" in note


def test_new_special_tokens_need_rows_and_are_the_tokenizers(model: Path) -> None:
    more = spec(model, new_special_tokens=("<|im_start|>", "<|im_end|>"))
    problem = vocabulary_problem(more, load_config(more), {"rows.jsonl": TOKENS + 1})
    assert problem is not None
    assert "set model.resize_embeddings: true" in problem
    grown = more.model_copy(update={"resize_embeddings": True})
    assert load_config(grown).vocab_size == TOKENS + 2
    assert vocabulary_problem(grown, load_config(grown), {"rows.jsonl": TOKENS + 1}) is None


def test_an_embedding_that_is_larger_than_the_tokenizer_is_nothing_to_tell(tmp_path: Path) -> None:
    material.write_model(tmp_path)
    material.write_tokenizer(tmp_path, 100)
    config = load_config(spec(tmp_path))
    assert vocabulary_notes(spec(tmp_path), config, config) == []
    resized = spec(tmp_path, resize_embeddings=True)
    assert load_config(resized).vocab_size == VOCABULARY
    (note,) = vocabulary_notes(resized, load_config(resized), stored_config(resized))
    assert "nothing to add" in note


def test_ids_with_gaps_need_a_row_each(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "z": 400}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(material.CONFIG))
    assert tokenizer_rows(spec(tmp_path)) == 401


@pytest.mark.parametrize("kind", ["words", "added", "pieces"])
def test_a_plan_without_transformers_counts_the_same_tokens(kind: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "config.json").write_text(json.dumps(material.CONFIG))
    of_pieces = models.Unigram([(f"p{number}", -1.0) for number in range(300)], unk_id=0)
    if kind == "pieces":
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(of_pieces)).save_pretrained(tmp_path)
    else:
        material.write_tokenizer(tmp_path, TOKENS)
    if kind == "added":
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|a|>", "<|b|>"]})
        tokenizer.save_pretrained(tmp_path)
    grown = spec(tmp_path, resize_embeddings=True)
    wanted = {"words": TOKENS, "added": TOKENS + 2, "pieces": 300}[kind]
    assert load_config(grown).vocab_size == wanted
    assert resized(load_config_json(str(tmp_path)), grown)["vocab_size"] == wanted
    assert resized(load_config_json(str(tmp_path)), spec(tmp_path)) == load_config_json(str(tmp_path))
    more = spec(tmp_path, resize_embeddings=True, new_special_tokens=("<|a|>", "<|c|>"))
    wanted += 1 if kind == "added" else 2
    assert load_config(more).vocab_size == tokenizer_rows(more) == wanted
    assert resized(load_config_json(str(tmp_path)), more)["vocab_size"] == wanted
    (tmp_path / "tokenizer.json").unlink()
    assert resized(load_config_json(str(tmp_path)), grown) == load_config_json(str(tmp_path))


def test_an_adapter_belongs_to_the_vocabulary_that_it_was_trained_with(model: Path) -> None:
    lora = {"type": "lora", "train_embeddings": True}
    plain, grown = job(model, method=lora), job(model, model={"resize_embeddings": True}, method=lora)
    assert identity(grown) == {**identity(plain), "vocabulary": TOKENS}


def test_resizing_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    material.write_model(tmp_path)
    with pytest.raises(SpecError, match=r"has no tokenizer that can be loaded .* leave out"):
        require_supported(job(tmp_path, model={"resize_embeddings": True}))


# Resizing


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("weights", ["read", "drawn", "of a checkpoint"])
def test_embedding_and_head_grow_together(weights: str, is_tied: bool, tmp_path: Path) -> None:
    material.write_model(tmp_path, tie_word_embeddings=is_tied)
    material.write_tokenizer(tmp_path, TOKENS)
    random = {"weights": "random"} if weights == "drawn" else {}
    resized = job(tmp_path, model={"resize_embeddings": True, **random})
    built = build_model(resized, torch.float32, STAGE_2, load_weights=weights != "of a checkpoint")
    embedding, head = built.get_input_embeddings(), built.get_output_embeddings()
    assert (head.weight is embedding.weight) == is_tied
    assert (embedding.num_embeddings, head.out_features, built.config.vocab_size) == (TOKENS,) * 3
    assert tuple(embedding.weight.shape) == tuple(head.weight.shape) == (TOKENS, 64)
    hidden = embedding(torch.tensor([TOKENS - 1]))
    assert head(hidden).shape == (1, TOKENS)
    if weights == "read":
        old = build_model(job(tmp_path), torch.float32, STAGE_2)
        for module, before in ((embedding, old.get_input_embeddings()), (head, old.get_output_embeddings())):
            torch.testing.assert_close(module.weight[:VOCABULARY], before.weight, rtol=0, atol=0)
            mean = before.weight.mean(dim=0)
            torch.testing.assert_close(module.weight[VOCABULARY:], mean.repeat(TOKENS - VOCABULARY, 1))


def test_a_head_with_a_bias_grows_with_it(tmp_path: Path) -> None:
    material.write_model_of("phi", tmp_path)
    material.write_tokenizer(tmp_path, TOKENS)
    built = build_model(job(tmp_path, model={"resize_embeddings": True}), torch.float32, STAGE_2)
    bias = built.get_output_embeddings().bias
    assert bias.shape == (TOKENS,)
    torch.testing.assert_close(bias[VOCABULARY:], bias[:VOCABULARY].mean().repeat(TOKENS - VOCABULARY))


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_base_of_adapters_grows_too(quantization: str, model: Path) -> None:
    method = {"type": "lora", "train_embeddings": True, "quantization": quantization}
    resized = job(model, model={"resize_embeddings": True}, method=method)
    built = build_model(resized, torch.float32, STAGE_2)
    shapes = {name: tuple(weight.shape) for name, weight in build_on_meta(resized).named_parameters()}
    mine = {name: tuple(weight.shape) for name, weight in built.named_parameters() if weight.requires_grad}
    assert mine.items() <= shapes.items()
    assert sum(shape[0] == TOKENS for shape in mine.values()) == 2
    merged = base_model(resized, torch.float32)
    assert merged.get_input_embeddings().weight.shape[0] == merged.config.vocab_size == TOKENS


def test_what_is_planned_and_counted_is_the_resized_model(model: Path) -> None:
    plain, resized = job(model), job(model, model={"resize_embeddings": True})
    added = 2 * 64 * (TOKENS - VOCABULARY)  # rows of embedding and LM head, hidden size 64
    before, after = require_supported(plain), require_supported(resized)
    assert before is not None
    assert after is not None
    assert after.total == before.total + added
    config = load_config(resized.model).to_dict()
    assert parameter_count(config, resized.method) == after
    shape = ModelDims.from_config(config)
    assert shape is not None
    assert shape.vocab_size == TOKENS


def test_lora_has_to_train_the_rows_that_are_added(model: Path) -> None:
    lora = job(model, model={"resize_embeddings": True}, method={"type": "lora"})
    ((fields, sentence),) = broken_rules(lora)
    assert fields == ("model.resize_embeddings", "method.train_embeddings")
    assert "train_embeddings: true" in sentence
    trained = job(model, model={"resize_embeddings": True}, method={"type": "lora", "train_embeddings": True})
    assert not list(broken_rules(trained))


# Position embeddings


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_learnt_positions_limit_the_length_of_documents(family: str, tmp_path: Path) -> None:
    limit = 95
    sizes = {"max_position_embeddings": limit, "ffn_dim": 64, "word_embed_proj_dim": 64}
    material.write_model_of(family, tmp_path, **sizes)
    require_supported(job(tmp_path, data={"max_length": limit}))
    with pytest.raises(SpecError, match=r"learnt embeddings of 95 positions .* at most 95"):
        require_supported(job(tmp_path, data={"max_length": limit + 1}))


def test_rotary_positions_beyond_the_models_are_a_line(model: Path) -> None:
    config = load_config(spec(model))
    assert length_note(config, 512) is None
    (note,) = model_notes(spec(model), config, 513)
    assert "data.max_length=513 is above max_position_embeddings=512" in note
    gpt2 = SimpleNamespace(max_position_embeddings=512)
    gpt2.get_text_config = lambda: gpt2
    assert length_note(gpt2, 513) is None


# Load-balancing loss


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "jetmoe"])
def test_a_balance_loss_that_is_asked_for_is_told_of(family: str) -> None:
    from transformers import AutoConfig

    name = "aux_loss_coef" if family == "jetmoe" else "router_aux_loss_coef"
    asked = AutoConfig.for_model(family, output_router_logits=True, **{name: 0.25})
    note = balance_note(asked, "a/model")
    assert note is not None
    for word in ("model.path=a/model", f"{name}=0.25", "not computed"):
        assert word in note
    assert balance_note(AutoConfig.for_model(family, output_router_logits=True, **{name: 0.0}), "m") is None
    assert balance_note(AutoConfig.for_model(family, **{name: 0.25}), "m") is None

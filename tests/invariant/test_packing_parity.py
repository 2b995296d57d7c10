"""Packing does not change the loss of the documents, for every format, truncation and packing."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.config.paths import resolve
from orchestrator.config.schema import DataSpec, JobSpec, ModelSpec, SourceSpec
from orchestrator.data import packed_dataset
from orchestrator.data.chat_template import Encoded, encode
from orchestrator.data.corpus import Corpus
from orchestrator.data.formats import parse
from orchestrator.data.loader import PackLoader
from orchestrator.data.readers import locate
from orchestrator.data.token_cache import TokenStore, write_index, write_shard
from orchestrator.model.build import build_model
from orchestrator.model.loss import ModelInputs, loss_sum
from orchestrator.run.worker_config import loader
from tests.invariant import material
from tests.invariant.material import write_model

CPU = torch.device("cpu")
MAX_LENGTH = 96
SAMPLE = [json.loads(line) for line in resolve("builtin/alpaca_sample").read_text().splitlines()][:24]


def _rows(kind: str) -> list[dict[str, Any]]:
    """Return 24 rows of the sample in a format."""
    talks = [
        [
            {"role": "user", "content": row["instruction"]},
            {"role": "assistant", "content": row["output"]},
            {"role": "user", "content": "Say it again."},
            {"role": "assistant", "content": row["output"][:80]},
        ]
        for row in SAMPLE
    ]
    names = {"user": "human", "assistant": "gpt"}
    return {
        "alpaca": SAMPLE,
        "messages": [{"messages": talk} for talk in talks],
        "sharegpt": [
            {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in talk]}
            for talk in talks
        ],
        "prompt_completion": [{"prompt": row["instruction"], "completion": row["output"]} for row in SAMPLE],
        "text": [{"text": row["output"]} for row in SAMPLE],
        "tokens": [
            {"input_ids": list(range(5, 45 + 9 * at)), "completion_mask": [0] * 7 + [1] * (33 + 9 * at)}
            for at in range(24)
        ],
    }[kind]


FORMATS = ("alpaca", "messages", "sharegpt", "prompt_completion", "text", "tokens")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    tokenizer = AutoTokenizer.from_pretrained(str(resolve("builtin/tiny-llama")))
    write_model(folder / "model", vocab_size=len(tokenizer))
    for kind in FORMATS:
        path = folder / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in _rows(kind)))
        (file,) = locate(SourceSpec(path=str(path)))
        rows = [parse(value, "auto") for block in file.blocks() for value in block.values]
        encoded = [row for row in encode(rows, tokenizer, "chat") if isinstance(row, Encoded)]
        assert len(encoded) == 24
        (folder / kind).mkdir()
        write_index(folder / kind, [write_shard(folder / kind, 0, encoded)], {})
    return folder


def _planned(home: Path, kind: str, **data: Any) -> tuple[Corpus, PackLoader, int]:
    """Return a corpus, its loader with one pack per step, and the number of packs."""
    source = SourceSpec(path=str(home / f"{kind}.jsonl"))
    settings = DataSpec(train=(source,), max_length=MAX_LENGTH, **data)
    job = JobSpec(name="parity", model=ModelSpec(path=str(home / "model")), data=settings)
    corpus, packs = packed_dataset.make([TokenStore(home / kind)], [source], settings, seed=3)
    return corpus, loader(job, corpus, packs, 1, shuffle=True), len(packs)


def _model(home: Path) -> torch.nn.Module:
    spec = ModelSpec(path=str(home / "model"), gradient_checkpointing=False)
    job = material.job_with(spec)
    return build_model(job, torch.float32, {"zero_optimization": {"stage": 2}}).eval()


@torch.no_grad()
def _packed_loss(model: torch.nn.Module, batches: PackLoader, packs: int) -> tuple[float, int]:
    held = [batch for step in range(packs) for batch in batches.micro_batches(step, 0)]
    total = sum(loss_sum(model, ModelInputs.from_batch(batch, "sdpa", CPU)).item() for batch in held)
    return total, sum(batch.trained_tokens for batch in held)


@torch.no_grad()
def _loss_alone(model: torch.nn.Module, tokens: np.ndarray, trained: np.ndarray) -> float:
    ids = torch.from_numpy(tokens.astype(np.int64))
    losses = functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
    return float(losses[torch.from_numpy(trained[1:].copy())].sum())


@pytest.mark.parametrize(("kind", "truncation"), list(product(FORMATS, ("right", "left", "drop", "split"))))
def test_the_loss_of_packs_is_that_of_their_documents_alone(home: Path, kind: str, truncation: str) -> None:
    model = _model(home)
    plain = AutoModelForCausalLM.from_pretrained(home / "model", attn_implementation="eager").eval()
    for packing in ("none", "best_fit", "concat"):
        corpus, batches, packs = _planned(home, kind, truncation=truncation, packing=packing)
        packed, trained = _packed_loss(model, batches, packs)
        documents = [corpus.document(number) for number in range(len(corpus))]
        alone = sum(_loss_alone(plain, document.tokens, document.trained) for document in documents)
        assert trained == corpus.counts.trained_tokens == sum(int(d.trained.sum()) for d in documents)
        assert packed == pytest.approx(alone, rel=1e-6), packing
        if packing == "none":
            unpacked = packed
        elif packing == "best_fit":
            assert packed == pytest.approx(unpacked, rel=1e-6)
    counts = corpus.counts
    assert counts.tokens_truncated or counts.tokens_dropped or counts.rows_split, "rows are too short"


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_padding_to_max_length_changes_no_loss(home: Path, micro_batch_size: int) -> None:
    model = _model(home)
    losses, slots = [], []
    for pad_to in (None, "max_length"):
        corpus, batches, packs = _planned(home, "messages", packing="none", pad_to=pad_to)
        rows = [list(range(first, packs))[:micro_batch_size] for first in range(0, packs, micro_batch_size)]
        held = [batches.assemble(list(row)) for row in rows]
        with torch.no_grad():
            inputs = [ModelInputs.from_batch(batch, "sdpa", CPU) for batch in held]
            losses.append([loss_sum(model, each).item() for each in inputs])
        slots.append(sum(len(batch.input_ids) for batch in held))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert slots == [corpus.counts.tokens_kept, packs * MAX_LENGTH]


@pytest.mark.parametrize("kind", ["messages", "tokens"])
@pytest.mark.parametrize("loss_on", ["response", "all", "last_turn"])
def test_what_is_trained_is_what_the_job_says(home: Path, kind: str, loss_on: str) -> None:
    model = _model(home)
    counts = []
    for packing in ("none", "best_fit"):
        corpus, batches, packs = _planned(home, kind, truncation="left", packing=packing, loss_on=loss_on)
        counts.append((*_packed_loss(model, batches, packs), corpus.counts.trained_tokens))
    assert counts[0] == pytest.approx(counts[1], rel=1e-6)
    assert counts[0][1] == counts[0][2]


def test_attention_across_a_whole_pack_is_one_long_document(home: Path) -> None:
    """XTuner's published profile: documents are concatenated and cut, and attention spans the whole pack."""
    model = _model(home)
    plain = AutoModelForCausalLM.from_pretrained(home / "model", attn_implementation="eager").eval()
    corpus, batches, packs = _planned(home, "alpaca", packing="concat", cross_document_attention=True)
    expected = 0.0
    for pack in range(packs):
        members = [corpus.document(number) for number in _members(batches, pack)]
        expected += _loss_alone(
            plain,
            np.concatenate([each.tokens for each in members]),
            np.concatenate([each.trained for each in members]),
        )
    total, trained = _packed_loss(model, batches, packs)
    assert trained == corpus.counts.trained_tokens
    assert total == pytest.approx(expected, rel=1e-6)
    apart, *_ = _packed_loss(model, _planned(home, "alpaca", packing="concat")[1], packs)
    assert apart != pytest.approx(total, rel=1e-4), "the two kinds of attention differ"


def _members(batches: PackLoader, pack: int) -> list[int]:
    members: list[int] = batches._packs.members(pack).tolist()
    return members

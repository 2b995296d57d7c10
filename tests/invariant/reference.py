"""Reference training: one process, one document per forward pass, with PyTorch and transformers only.

It uses no DeepSpeed, packing, padding or own attention. The project decides only which documents form a step,
and the learning rate schedule.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from orchestrator.config.schema import JobSpec, OptimSpec
from orchestrator.data.corpus import Corpus, Document
from orchestrator.engine.lr_schedule import learning_rate
from orchestrator.run.worker_config import training_loader
from tests.invariant import material

Arrays = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Reference:
    """Results of reference training.

    Attributes:
        losses: Mean loss per trained token, by step.
        gradient_norms: Global L2 norm before clipping, by step.
        learning_rates: Learning rate, by step.
        evaluation: Mean loss per trained token of the held-out documents after the last step.
        gradients: Gradients of the first step before clipping.
        parameters: Parameters after the last step.
    """

    losses: list[float]
    gradient_norms: list[float]
    learning_rates: list[float]
    evaluation: float | None
    gradients: Arrays
    parameters: Arrays


def train(
    document: dict[str, Any],
    data: Path,
    held_out: Path | None = None,
    adapt: Callable[[Any], Any] | None = None,
) -> Reference:
    """Train a job in one process; `workers`, `parallel` and `method` are ignored.

    Args:
        document: The job document.
        data: Token store of the training documents.
        held_out: Token store of the documents to evaluate.
        adapt: Adds adapters to the model.
    """
    job = JobSpec.model_validate_json(json.dumps(document))
    model = AutoModelForCausalLM.from_pretrained(
        job.model.path, attn_implementation="eager", dtype=torch.float32
    ).train()
    if adapt is not None:
        model = adapt(model)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optim = job.optim
    optimizers = _optimizers(optim, trained)
    corpus, packs = material.planned(job, data)
    loader, last, steps = training_loader(job, corpus, packs)
    losses, norms, rates, gradients = [], [], [], {}
    for step in range(steps):
        numbers = [number for number in loader.pack_numbers(step, last) if number is not None]
        documents = [corpus.document(member) for number in numbers for member in packs.members(number)]
        for optimizer, _ in optimizers:
            optimizer.zero_grad()
        losses.append(_backward(model, documents))
        gradients = gradients or {name: weight.grad.numpy().copy() for name, weight in trained.items()}
        norms.append(
            float(torch.nn.utils.clip_grad_norm_(trained.values(), optim.max_grad_norm or float("inf")))
        )
        rates.append(learning_rate(optim, step, steps))
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rates[-1] * peak / optim.lr
            optimizer.step()
    parameters = {name: weight.detach().numpy() for name, weight in model.named_parameters()}
    evaluation = None if held_out is None else _evaluate(model, material.planned(job, held_out)[0])
    return Reference(losses, norms, rates, evaluation, gradients, parameters)


@contextmanager
def muon_in_fp32() -> Iterator[None]:
    """Make PyTorch's Muon run the Newton-Schulz iteration in fp32 instead of bf16."""
    from torch.optim import _muon

    def orthogonal(
        gradient: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
    ) -> torch.Tensor:
        a, b, c = coefficients
        # Transpose tall matrices, so that the Gram matrix [rows, rows] is the smaller one.
        wide = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
        wide = wide / wide.norm().clamp(min=eps)
        for _ in range(steps):
            gram = wide @ wide.T
            wide = a * wide + (b * gram + c * gram @ gram) @ wide
        return wide if gradient.shape[0] <= gradient.shape[1] else wide.T

    before = _muon._zeropower_via_newtonschulz
    _muon._zeropower_via_newtonschulz = orthogonal
    try:
        yield
    finally:
        _muon._zeropower_via_newtonschulz = before


def _optimizers(optim: OptimSpec, trained: dict[str, Any]) -> list[tuple[torch.optim.Optimizer, float]]:
    """Return PyTorch's AdamW, and Muon if the job uses it, with their peak learning rates.

    Muon gets the 2-D weights inside layers, AdamW everything else.
    """
    # Embedding and head are matrices as well, but are outside the layers and trained with AdamW.
    in_layers = [weight for name, weight in trained.items() if ".layers." in name and weight.ndim == 2]
    matrices = in_layers if optim.optimizer == "muon" else []
    others = [weight for weight in trained.values() if not any(weight is matrix for matrix in matrices)]
    adam = torch.optim.AdamW(
        others, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    if not matrices:
        return [(adam, optim.lr)]
    assert optim.muon_lr is not None
    muon = torch.optim.Muon(matrices, lr=optim.muon_lr, weight_decay=optim.weight_decay, momentum=0.95)
    return [(adam, optim.lr), (muon, optim.muon_lr)]


def _backward(model: nn.Module, documents: list[Document]) -> float:
    trained = sum(int(document.trained[1:].sum()) for document in documents)
    total = 0.0
    for document in documents:
        loss = loss_sum(model, document)
        (loss / trained).backward()
        total += loss.item()
    return total / trained


@torch.no_grad()
def _evaluate(model: nn.Module, corpus: Corpus) -> float:
    documents = [corpus.document(number) for number in range(len(corpus))]
    total = sum(loss_sum(model, document).item() for document in documents)
    return total / sum(int(document.trained[1:].sum()) for document in documents)


def loss_sum(model: nn.Module, document: Document) -> torch.Tensor:
    """Return the sum of the cross-entropy over a document's trained tokens."""
    tokens = torch.from_numpy(document.tokens.astype(np.int64))  # [length]
    # Logits [length - 1, vocabulary]: position t predicts token t + 1.
    logits = model(input_ids=tokens[None]).logits[0, :-1]
    losses = functional.cross_entropy(logits, tokens[1:], reduction="none")
    return losses[torch.from_numpy(document.trained[1:].copy())].sum()

"""The jobs of published tables are valid, match the tables, and render to a DeepSpeed configuration."""

import re
from pathlib import Path

import pytest

from orchestrator.arch.flops import flops_per_token_xtuner
from orchestrator.arch.model_dims import ModelDims
from orchestrator.bench import sweep
from orchestrator.config import loader
from orchestrator.parallel.deepspeed_config import render
from orchestrator.parallel.parallel_dims import ParallelDims, sequence_parallel_problem

FOLDER = Path(__file__).parents[3] / "launch" / "jobs" / "published" / "xtuner"
K = 1024
# Number of GPUs, max_length and sequence_parallel_size of every row of the table.
ROWS = {
    "llama2-7b-8k": (8, 8 * K, 1),
    "llama2-7b-32k": (8, 32 * K, 1),
    "llama2-7b-128k": (8, 128 * K, 8),
    "llama2-7b-256k": (8, 256 * K, 8),
    "llama2-7b-1m": (32, K * K, 16),
    "yi-34b-200k-8k": (32, 8 * K, 1),
    "yi-34b-200k-32k": (32, 32 * K, 2),
    "yi-34b-200k-128k": (32, 128 * K, 8),
    "yi-34b-200k-256k": (32, 256 * K, 8),
    "llama2-70b-8k": (32, 8 * K, 1),
    "llama2-70b-32k": (32, 32 * K, 4),
    "llama2-70b-128k": (32, 128 * K, 8),
    "llama2-70b-256k": (32, 256 * K, 16),
    "llama2-70b-1m": (64, K * K, 64),
}
HEADS = {"llama2-7b": (32, 32), "yi-34b-200k": (56, 8), "llama2-70b": (64, 8)}


def test_there_is_a_job_for_every_row_and_no_other() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted(ROWS)


@pytest.mark.parametrize("profile", ["true", "false"])
@pytest.mark.parametrize("name", ROWS)
def test_a_published_job(name: str, profile: str) -> None:
    job = loader.load(FOLDER / f"{name}.yaml", [f"data.cross_document_attention={profile}"])
    workers, max_length, size = ROWS[name]
    assert job.name == f"xtuner-{name}"
    assert (job.parallel.workers, job.data.max_length) == (workers, max_length)
    assert job.parallel.sequence_parallel_size == size
    assert job.gradient_accumulation_steps == size, "XTuner accumulates as often as workers share a sequence"
    assert [source.repeat for source in job.data.train] == [6 if max_length >= 128 * K else 1] * 2
    config = render(job, "bf16", "cuda")
    assert config["train_micro_batch_size_per_gpu"] == 1
    layout = ParallelDims.from_job(job)
    at_once = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
    assert config["train_batch_size"] == at_once * layout.world_size
    heads = HEADS[name.rsplit("-", 1)[0]]
    assert sequence_parallel_problem(size, *heads) is None


SWEEPS = FOLDER.parent
PAGES = {"xtuner": 14, "qwen": 84, "ms-swift": 35, "llm-action": 16, "llama2-lora": 24}


@pytest.mark.parametrize("page", PAGES)
def test_the_sweep_of_a_page_and_its_toy_twin(page: str) -> None:
    full, toy = (sweep.load(SWEEPS / f"{name}.yaml") for name in (page, f"{page}-toy"))
    assert full.spec.layout == toy.spec.layout == page
    assert len(full.cells) == PAGES[page]
    assert 4 <= len(toy.cells) <= 8
    for cell in toy.cells:
        assert cell.job.model.path == "builtin/tiny-llama"
        assert cell.job.parallel.device == "cpu"
        assert cell.job.parallel.workers <= 2
    assert {cell.job.parallel.device for cell in full.cells} == {"auto"}
    assert {cell.job.method.type for cell in full.cells} == {cell.job.method.type for cell in toy.cells}
    of_few_bits = {"GPTQ" in c.job.model.path or c.job.method.quantization != "none" for c in full.cells}
    assert of_few_bits == {cell.job.method.quantization != "none" for cell in toy.cells}


def test_there_is_a_sweep_for_every_page_and_no_other() -> None:
    names = {page + end for page in PAGES for end in ("", "-toy")}
    assert {path.stem for path in SWEEPS.glob("*.yaml")} == names


def test_xtuners_formula_gives_the_tflops_that_are_printed_in_13_of_14_rows() -> None:
    sizes = {
        "llama2-7b": (4096, 32, 32, 11008, 32000),
        "yi-34b-200k": (7168, 60, 56, 20480, 64000),
        "llama2-70b": (8192, 80, 64, 28672, 32000),
    }
    right = []
    for name, (_, max_length, _) in ROWS.items():
        text = (FOLDER / f"{name}.yaml").read_text()
        found = re.search(r"([\d.]+) TGS and ([\d.]+) TFLOPs as printed", text)
        assert found, name
        tgs, printed = (float(each) for each in found.groups())
        hidden, layers, heads, inner, vocabulary = sizes[name.rsplit("-", 1)[0]]
        shape = ModelDims(hidden, layers, heads, heads, hidden // heads, inner, vocabulary)
        computed = tgs * flops_per_token_xtuner(shape, max_length) / 1e12
        right.append(computed == pytest.approx(printed, rel=1.5e-3))
    assert right.count(True) == 13

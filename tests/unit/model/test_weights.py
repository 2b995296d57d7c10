"""A job is rejected unless the model's files hold exactly the tensors of its architecture."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.errors import SpecError
from orchestrator.model.build import base_model, build_model, require_supported
from orchestrator.model.weights import WeightsMismatch, without_empty_biases
from tests.invariant import material
from tests.unit.model.damage import (
    FILE,
    HEAD,
    INDEX,
    SECOND,
    STAGE_2,
    UP,
    Tensors,
    configure,
    cut,
    job,
    lora_folder,
    pickle,
    pointer,
    rewrite,
    shard,
    shard_and,
    under,
)

REFUSED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "one tensor lost": (rewrite(lambda t: t.pop(UP)), ("lacks 1 of", UP, "copy the model again")),
    "head lost and not tied": (
        rewrite(lambda t: t.pop(HEAD)),
        ("lacks 1 of", HEAD, "tie_word_embeddings is false"),
    ),
    "a layer lost": (
        rewrite(lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name]),
        ("lacks 9 of", "model.layers.1.input_layernorm.weight", "and 6 more"),
    ),
    "all names of a wrapper": (
        under("base_model.model."),
        ("lacks 21 of", "has 21 tensors", "begin with base_model.model.", "merge_and_unload"),
    ),
    "all names of another wrapper": (under("_orig_mod."), ("begin with _orig_mod.",)),
    "more layers than config.json says": (
        configure(num_hidden_layers=1),
        ("has 9 tensors that LlamaForCausalLM has no place for", "model.layers.1.", "config.json"),
    ),
    "fewer layers than config.json says": (
        configure(num_hidden_layers=3),
        ("lacks 9 of", "model.layers.2.", "num_hidden_layers=3"),
    ),
    "another architecture": (configure(model_type="gpt2"), ("lacks", "has no place for", "GPT2LMHeadModel")),
    "config.json of another size": (
        configure(intermediate_size=128),
        ("has 6 tensors of another shape", "is [176, 64] and not [128, 64]", "config.json"),
    ),
    "a smaller vocabulary in config.json": (
        configure(vocab_size=100),
        ("has 2 tensors of another shape", "[160, 64] and not [100, 64]"),
    ),
    "head of another task": (
        rewrite(lambda t: t.update({"score.weight": torch.zeros(2, 64)})),
        ("has 1 tensor that", "score.weight", "without heads"),
    ),
    "no weights": (lambda folder: (folder / FILE).unlink(), ("has no weights", "model.weights: random")),
    "shards without an index": (
        shard_and(lambda folder: (folder / INDEX).unlink()),
        ("has 2 files", "no model.safetensors.index.json"),
    ),
    "a shard lost": (
        shard_and(lambda folder: (folder / SECOND).unlink()),
        ("lacks 1 of the 2 files", SECOND),
    ),
    "a shard cut short": (shard_and(cut(SECOND)), ("cannot be read", SECOND)),
    "an index that is none": (
        shard_and(lambda folder: (folder / INDEX).write_text("[]")),
        ("index that cannot be read", INDEX),
    ),
    "a file cut short": (cut(FILE), ("cannot be read", FILE, "copy it again")),
    "an empty file": (lambda folder: (folder / FILE).write_bytes(b""), ("cannot be read", FILE)),
    "a pointer of Git LFS": (pointer, ("pointer of Git LFS", "git lfs pull")),
    "one tensor lost from a pickle": (
        lambda folder: pickle(folder, lambda t: t.pop(UP)),
        ("lacks 1 of", UP),
    ),
    "a pickle cut short": (
        lambda folder: (pickle(folder), cut("pytorch_model.bin")(folder)),
        ("cannot be read", "pytorch_model.bin"),
    ),
    "the folder of an adapter": (lora_folder, ("is an adapter", "method.adapter")),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_not_the_models_are_refused_by_the_driver(case: str, model: Path) -> None:
    damage, words = REFUSED[case]
    damage(model)
    with pytest.raises(SpecError) as refusal:
        require_supported(job(model))
    (problem,) = refusal.value.problems
    assert problem.startswith(f"model.path={model} ")
    for word in words:
        assert word in problem
    assert len(problem) < 900


@pytest.mark.parametrize(
    "case", ["one tensor lost", "a smaller vocabulary in config.json", "a file cut short"]
)
@pytest.mark.parametrize("method", ["full", "lora", "nf4", "int8"])
def test_a_worker_and_a_merge_refuse_them_too(case: str, method: str, model: Path) -> None:
    damage, words = REFUSED[case]
    damage(model)
    section = {"type": "full"} if method == "full" else {"type": "lora"}
    section |= {"quantization": method} if method in ("nf4", "int8") else {}
    for build in (
        lambda spec: build_model(spec, torch.float32, STAGE_2),
        lambda spec: base_model(spec, torch.float32),
    ):
        with pytest.raises(SpecError) as refusal:
            build(job(model, method=section))
        assert all(word in str(refusal.value) for word in words)


def test_what_a_checkpoint_replaces_need_not_be_there(model: Path) -> None:
    (model / FILE).unlink()
    require_supported(job(model), reads_weights=False)
    build_model(job(model), torch.float32, STAGE_2, load_weights=False)
    lora = job(model, method={"type": "lora"})
    with pytest.raises(SpecError, match="has no weights"):
        require_supported(lora, reads_weights=False)
    with pytest.raises(SpecError, match="has no weights"):
        build_model(lora, torch.float32, STAGE_2, load_weights=False)


def test_random_weights_need_no_file(model: Path) -> None:
    (model / FILE).unlink()
    require_supported(job(model, model={"weights": "random"}))
    build_model(job(model, model={"weights": "random"}), torch.float32, STAGE_2)


def in_old_names(tensors: Tensors) -> None:
    """Add the RoPE frequencies that old checkpoints store, although they are a computed buffer."""
    for layer in (0, 1):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)


def without_prefix(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("model.")]:
        tensors[name.removeprefix("model.")] = tensors.pop(name)


WHOLE: dict[str, Callable[[Path], object]] = {
    "as saved": lambda folder: None,
    "in shards": shard,
    "in a pickle": pickle,
    "with computed buffers": rewrite(in_old_names),
    "saved as the model without its head's prefix": rewrite(without_prefix),
}


@pytest.mark.parametrize("case", WHOLE)
def test_whole_weights_are_not_refused(case: str, model: Path) -> None:
    expected = load_file(model / FILE)
    WHOLE[case](model)
    require_supported(job(model))
    built = build_model(job(model), torch.float32, STAGE_2).state_dict()
    assert built.keys() == expected.keys()
    assert all(torch.equal(built[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stored", ["both", "embedding", "head"])
def test_tied_weights_are_stored_once_or_twice(stored: str, tmp_path: Path) -> None:
    material.write_model(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / FILE)
    embedding = tensors.pop("model.embed_tokens.weight")
    tensors |= {"model.embed_tokens.weight": embedding} if stored != "head" else {}
    tensors |= {HEAD: embedding.clone()} if stored != "embedding" else {}
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    require_supported(job(tmp_path))
    built = build_model(job(tmp_path), torch.float32, STAGE_2)
    assert torch.equal(built.get_input_embeddings().weight, embedding)
    assert built.get_output_embeddings().weight is built.get_input_embeddings().weight


def test_tied_weights_that_are_in_no_file_are_refused(tmp_path: Path) -> None:
    material.write_model(tmp_path, tie_word_embeddings=True)
    rewrite(lambda tensors: tensors.pop("model.embed_tokens.weight"))(tmp_path)
    with pytest.raises(SpecError, match=r"lacks 2 of .*model\.embed_tokens\.weight"):
        require_supported(job(tmp_path))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "experts"
    material.write_model_of("mixtral", folder, num_local_experts=4, num_experts_per_tok=2)
    return folder


def test_experts_that_are_joined_while_they_are_read_are_not_refused(experts: Path) -> None:
    assert any(
        ".experts.3." in name for name in load_file(experts / FILE)
    )  # one tensor per expert; transformers merges them
    require_supported(job(experts))
    build_model(job(experts), torch.float32, STAGE_2)


@pytest.mark.parametrize("number", [0, 3])
def test_a_lost_expert_is_refused(number: int, experts: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(experts, tmp_path / "model")
    rewrite(
        lambda t: [t.pop(name) for name in list(t) if f"layers.1.block_sparse_moe.experts.{number}." in name]
    )(folder)
    with pytest.raises(SpecError, match=r"layers\.1\.mlp\.experts\.\w+ is \[3, .* and not \[4,"):
        require_supported(job(folder))


def test_a_lost_matrix_of_an_expert_is_refused(experts: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(experts, tmp_path / "model")
    rewrite(lambda t: t.pop("model.layers.0.block_sparse_moe.experts.2.w1.weight"))(folder)
    with pytest.raises(SpecError, match=r"cannot be joined .*model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        require_supported(job(folder))
    with pytest.raises(SpecError, match=r"cannot be joined"):
        build_model(job(folder), torch.float32, STAGE_2)


def test_layers_that_the_class_itself_leaves_out_are_not_refused(tmp_path: Path) -> None:
    """Checkpoints of Qwen, DeepSeek and GLM hold multi-token prediction layers that the classes ignore."""
    from transformers import LlamaForCausalLM

    material.write_model(tmp_path)
    rewrite(lambda t: t.update({"model.layers.61.eh_proj.weight": torch.zeros(2, 2)}))(tmp_path)
    with pytest.raises(SpecError, match="eh_proj"):
        require_supported(job(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.61.*"])
        require_supported(job(tmp_path))
        build_model(job(tmp_path), torch.float32, STAGE_2)


def test_biases_of_zero_beside_quantised_matrices_change_nothing(tmp_path: Path) -> None:
    """Only the comparison is tested here; tests/invariant/test_gptq.py loads complete GPTQ checkpoints."""
    layer = "model.layers.0.self_attn.q_proj"
    stored = {f"{layer}.qweight": torch.ones(2), f"{layer}.bias": torch.zeros(2), "norm.bias": torch.zeros(2)}
    save_file(stored, tmp_path / FILE)
    found = WeightsMismatch(unexpected=(f"{layer}.bias", "norm.bias", "score.weight"))
    assert without_empty_biases(found, [tmp_path / FILE]).unexpected == ("norm.bias", "score.weight")
    save_file({**stored, f"{layer}.bias": torch.ones(2)}, tmp_path / FILE)
    assert without_empty_biases(found, [tmp_path / FILE]) == found


def test_the_check_says_nothing_on_the_terminal(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rewrite(lambda tensors: tensors.pop(UP))(model)
    with pytest.raises(SpecError):
        require_supported(job(model))
    assert UP not in capfd.readouterr().err


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_with_code_of_its_own_is_compared_too(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (model / "own.py").write_text(CODE)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    configure(model_type="own", auto_map=classes)(model)
    trusted = job(model, model={"trust_remote_code": True})
    require_supported(trusted)
    assert type(build_model(trusted, torch.float32, STAGE_2)).__name__ == "OwnForCausalLM"
    rewrite(lambda tensors: tensors.pop(UP))(model)
    with pytest.raises(SpecError, match="lacks 1 of the tensors of OwnForCausalLM"):
        require_supported(trusted)
    with pytest.raises(SpecError, match="lacks 1 of the tensors of OwnForCausalLM"):
        build_model(trusted, torch.float32, STAGE_2)

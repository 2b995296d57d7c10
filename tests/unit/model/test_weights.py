"""A model's files hold its weights: all of them, no others, in their shapes; or the job is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.errors import SpecError
from orchestrator.model.build import base_model, build_model, require_supported, stored_config
from orchestrator.model.weights import Difference, weight_files, without_empty_biases
from orchestrator.spec import JobSpec, ModelSpec
from tests.invariant import material

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"
HEAD = "lm_head.weight"
STAGE_2 = {"zero_optimization": {"stage": 2}}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "whole"
    material.write_model(folder)
    return folder


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "model")


def job(folder: Path, **sections: Any) -> JobSpec:
    document = material.job(folder, 1, {"zero_stage": 2}, **sections)
    return JobSpec.model_validate_json(json.dumps(document))


def rewrite(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / FILE)
        change(tensors)
        save_file(tensors, folder / FILE, metadata={"format": "pt"})

    return apply


def configure(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return apply


def under(prefix: str) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    return rewrite(change)


def shard(folder: Path) -> None:
    """Spread the weights over two files with an index."""
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    where = {}
    for number in (0, 1):
        name = f"model-{number + 1:05d}-of-00002.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::2]}
        save_file(part, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(part, name))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def shard_and(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        shard(folder)
        change(folder)

    return apply


def pickle(folder: Path, change: Callable[[Tensors], object] = lambda tensors: None) -> None:
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    change(tensors)
    torch.save(tensors, folder / "pytorch_model.bin")


def cut(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return apply


def pointer(folder: Path) -> None:
    (folder / FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def lora_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


SECOND = "model-00002-of-00002.safetensors"
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
    """Add what old checkpoints hold: the frequencies of rotary embeddings, a buffer that is computed."""
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
    assert any(".experts.3." in name for name in load_file(experts / FILE))  # stored one by one
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
    """Qwen, DeepSeek and GLM store layers that predict further tokens, and their classes say so."""
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
    """Whole GPTQ checkpoints are loaded in tests/invariant/test_gptq.py, where its package is installed."""
    layer = "model.layers.0.self_attn.q_proj"
    stored = {f"{layer}.qweight": torch.ones(2), f"{layer}.bias": torch.zeros(2), "norm.bias": torch.zeros(2)}
    save_file(stored, tmp_path / FILE)
    found = Difference(unexpected=(f"{layer}.bias", "norm.bias", "score.weight"))
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


@pytest.fixture
def hub(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lay a model out as the hub's cache has it, where the hub itself is out of reach; return its folder."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return shutil.copytree(whole, repository / "snapshots" / ("0" * 40))


@pytest.mark.parametrize("layout", ["one file", "shards"])
def test_a_hub_model_is_looked_at_where_it_is_cached(layout: str, hub: Path) -> None:
    if layout == "shards":
        shard(hub)
    named = job(hub).model_copy(update={"model": ModelSpec(path="org/name")})
    config = stored_config(named.model)
    assert {file.parent for file in weight_files(named.model, config, download=False) or ()} == {hub}
    require_supported(named)
    build_model(named, torch.float32, STAGE_2)
    configure(num_hidden_layers=3)(hub)
    with pytest.raises(SpecError, match=r"model\.path=org/name lacks 9 of the tensors"):
        require_supported(named)
    with pytest.raises(SpecError, match=r"model\.path=org/name lacks 9 of the tensors"):
        build_model(named, torch.float32, STAGE_2)


@pytest.mark.parametrize("lost", ["all", "a shard"])
def test_a_hub_model_that_is_not_cached_is_left_to_the_workers(lost: str, hub: Path) -> None:
    shard(hub)
    for file in hub.glob("*.safetensors*" if lost == "all" else SECOND):
        file.unlink()
    named = job(hub).model_copy(update={"model": ModelSpec(path="org/name")})
    require_supported(named)
    with pytest.raises(SpecError, match=r"model\.path=org/name "):
        build_model(named, torch.float32, STAGE_2)


def write_adapter(folder: Path, whole: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16.0, target_modules=["q_proj", "up_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(whole), config).save_pretrained(folder)


A = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
ADAPTERS: dict[str, tuple[Callable[[Tensors], object], tuple[str, ...]]] = {
    "one lost": (lambda t: t.pop(A), ("lacks 1 of the tensors of the adapter of this job", A)),
    "one too many": (
        lambda t: t.update({"x.lora_A.weight": torch.zeros(2)}),
        ("has 1 tensor that", "x.lora_A"),
    ),
    "another width": (lambda t: t.update({A: torch.zeros(8, 32)}), (f"{A} is [8, 32] and not [8, 64]",)),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_that_is_not_whole_is_refused(case: str, whole: Path, tmp_path: Path) -> None:
    change, words = ADAPTERS[case]
    write_adapter(tmp_path, whole)
    method = {"type": "lora", "targets": ["q_proj", "up_proj"], "adapter": str(tmp_path)}
    require_supported(job(whole, method=method))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(SpecError) as refusal:
        require_supported(job(whole, method=method))
    assert all(word in str(refusal.value) for word in (f"method.adapter={tmp_path} does not have", *words))


@pytest.mark.parametrize("damage", ["cut", "pointer", "lost"])
def test_an_adapter_whose_file_cannot_be_read_is_refused(damage: str, whole: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path, whole)
    file = tmp_path / "adapter_model.safetensors"
    if damage == "cut":
        cut(file.name)(tmp_path)
    elif damage == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\n")
    else:
        file.unlink()
    method = {"type": "lora", "targets": ["q_proj", "up_proj"], "adapter": str(tmp_path)}
    words = {"cut": "cannot be read", "pointer": "git lfs pull", "lost": "has no adapter_model.safetensors"}
    with pytest.raises(SpecError, match=words[damage]):
        require_supported(job(whole, method=method))

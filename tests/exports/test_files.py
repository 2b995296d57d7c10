"""The files of an export: what is copied from the base model, permissions, and the model card."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from orchestrator.config.schema import JobSpec
from orchestrator.errors import SpecError, TrainingError
from orchestrator.export import config_files
from orchestrator.export.base_files import base_model_dir, copied_files
from orchestrator.export.destination import MARKER
from orchestrator.export.model_card import hub_name
from orchestrator.export.run_exports import export_run
from orchestrator.export.weight_files import parse_size
from tests.exports import compute, runs
from tests.exports.conftest import LORA, Exported
from tests.support.checkpoints import write_checkpoint

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "qwen.tiktoken", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/tools.jinja", "spiece.model", "tekken.json",
)  # fmt: skip
MODEL_FILES = (
    "generation_config.json", "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "preprocessor_config.json",
    "custom_generate/generate.py", "modeling_own.py", "configuration_own.py", "scaling_own.py",
)  # fmt: skip
NOT_COPIED = (
    "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "README.md", "train.py",
    "secrets.txt", "trainer_state.json", "data/rows.json", "original/params.json", "optimizer.pt",
    "config.json",
)  # fmt: skip


def test_all_files_of_the_model_but_weights_are_copied(tmp_path: Path) -> None:
    runs.with_own_code(runs.write_base(tmp_path / "base"))
    for name in (*TOKENIZER_FILES, *MODEL_FILES, *NOT_COPIED):
        path = tmp_path / "base" / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text(name)
    assert set(copied_files(tmp_path / "base")) == {*TOKENIZER_FILES, *MODEL_FILES}
    assert set(copied_files(tmp_path / "base", only_tokenizer=True)) == set(TOKENIZER_FILES)


def test_copied_files_equal_those_of_the_base_model(exported: dict[str, Exported]) -> None:

    for case in exported.values():
        names = copied_files(case.base, only_tokenizer=(case.folder / "adapter_config.json").exists())
        assert {"tokenizer.json", "chat_template.jinja"} <= set(names)
        for name in set(names) - {"tokenizer_config.json"}:
            assert (case.folder / name).read_bytes() == (case.base / name).read_bytes()


def test_config_has_the_settings_of_the_base_model(exported: dict[str, Exported]) -> None:
    for name in ("full", "merged"):
        directories = (exported[name].base, exported[name].folder)
        base, config = (json.loads((path / "config.json").read_text()) for path in directories)
        dtypes = {"torch_dtype": "float32", "dtype": "float32"}
        assert config == {**base, **dtypes}
        assert config["rope_theta"] == 5.0e5
        assert config["rope_scaling"] == runs.LLAMA3

        settings = [json.loads((path / "tokenizer_config.json").read_text()) for path in directories]
        assert settings[0] == settings[1]


def test_rope_parameters_of_transformers_5_are_written_for_both_versions() -> None:
    def added(**base: Any) -> dict[str, Any]:
        config = config_files.model_config(base, "bf16", "X", {})
        assert config.items() >= base.items()
        return {
            name: value for name, value in config.items() if name.startswith(("rope_", "rotary", "partial"))
        }

    plain = {"rope_theta": 3.0, "rope_type": "default"}
    assert added(rope_parameters=plain) == {"rope_parameters": plain, "rope_theta": 3.0, "rope_scaling": None}
    scaled = {"rope_theta": 3.0, "rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}
    assert added(rope_parameters=scaled, model_type="phi") == {
        "rope_parameters": scaled,
        "rope_theta": 3.0,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    }
    neox = added(rope_parameters={**plain, "partial_rotary_factor": 0.5}, model_type="gpt_neox")
    assert (neox["rotary_emb_base"], neox["rotary_pct"]) == (3.0, 0.5)
    layers = {"full_attention": scaled, "sliding_attention": {**plain, "rope_theta": 9.0}}
    gemma = added(rope_parameters=layers, model_type="gemma3_text")
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"]) == (3.0, 9.0)
    assert gemma["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert "rope_scaling" not in added(rope_parameters=layers, model_type="other")
    assert added(rope_theta=5.0, rope_scaling=None) == {"rope_theta": 5.0, "rope_scaling": None}


def test_config_has_the_dtype_and_vocab_size_of_the_weights_and_no_quantization() -> None:
    base = {"vocab_size": 10, "quantization_config": {"bits": 4}, "hidden_size": 8, "torch_dtype": "float16"}
    config = config_files.model_config(base, "bf16", "LlamaForCausalLM", {"vocab_size": 12, "hidden_size": 9})
    assert config == {
        "vocab_size": 12,
        "hidden_size": 8,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        "architectures": ["LlamaForCausalLM"],
    }


def test_a_resized_embedding_changes_vocab_size(tmp_path: Path) -> None:
    made = runs.write_run(tmp_path / "runs" / "run", runs.write_base(tmp_path / "base"), steps=())
    made.model.resize_token_embeddings(2050, mean_resizing=False)
    write_checkpoint(made.folder / "checkpoints", 6, runs.trained_state(made.model))
    export_run(made.folder, tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["vocab_size"] == 2050
    answer = compute.answer(str(tmp_path / "export"))
    made.model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = made.model.eval()(torch.tensor([compute.IDS])).logits[0]
    torch.testing.assert_close(torch.tensor(answer["logits"]), logits, rtol=1e-5, atol=1e-5)


def test_weights_are_sharded_and_cast(exported: dict[str, Exported], tmp_path: Path) -> None:
    whole = load_file(exported["full of transformers 5"].folder / "model.safetensors")
    run = exported["full of transformers 5"].run.folder
    done = export_run(run, tmp_path / "export", dtype="bf16", max_shard_bytes=parse_size("60KB"))
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert index["weight_map"].keys() == whole.keys()
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "export" / file, framework="pt") as opened:
            assert torch.equal(opened.get_tensor(name), whole[name].bfloat16())
    assert (
        index["metadata"]["total_size"] == 2 * done.parameters == 2 * sum(t.numel() for t in whole.values())
    )

    printed = done.as_json()
    assert printed["dtype"] == "bf16"
    assert {file["name"]: file["bytes"] for file in printed["files"]} == {
        str(path.relative_to(tmp_path / "export")): path.stat().st_size
        for path in (tmp_path / "export").rglob("*")
    }

    assert printed["bytes"] == sum(file["bytes"] for file in printed["files"])


def test_a_value_out_of_range_of_fp16_is_an_error(tmp_path: Path) -> None:
    made = runs.write_run(tmp_path / "runs" / "run", runs.write_base(tmp_path / "base"), steps=())
    with torch.no_grad():
        made.model.lm_head.weight[0, :2] = 1.0e5
    write_checkpoint(made.folder / "checkpoints", 6, runs.trained_state(made.model))
    with pytest.raises(TrainingError, match=r"2 values of lm_head\.weight exceed the range of fp16"):
        export_run(made.folder, tmp_path / "export", dtype="fp16")
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("text", ["0GB", "abc", "-1GB", "10", "1e3GB", ""])
def test_an_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="is not a size"):
        parse_size(text)


def test_sizes_are_parsed() -> None:
    assert [parse_size(text) for text in ("2GB", "1.5 gb", "500MB")] == [2 * 10**9, 15 * 10**8, 5 * 10**8]


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
@pytest.mark.parametrize("name", ["full", "sharded", "lora", "merged"])
def test_file_permissions_follow_the_umask(
    name: str, umask: int, file: int, folder: int, exported: dict[str, Exported], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"merge": name == "merged"}
    options |= {"max_shard_bytes": 100_000} if name == "sharded" else {}
    before = os.umask(umask)
    try:
        export_run(exported[name].run.folder, tmp_path / "a" / "export", **options)
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "a").rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_file()} == {file}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {folder}


@pytest.mark.process
@pytest.mark.skipif(os.geteuid() != 0, reason="changing the user needs root")
def test_another_user_can_load_an_export_if_the_umask_allows_it(
    exported: dict[str, Exported], shared_dir: Path
) -> None:
    before = os.umask(0o077)
    try:
        export_run(exported["full"].run.folder, shared_dir / "private")
    finally:
        os.umask(before)
    tasks = {name: case.task for name, case in exported.items()}
    tasks["private"] = {**tasks["full"], "folder": str(shared_dir / "private")}
    with tempfile.TemporaryDirectory() as root:
        Path(root).chmod(0o777)
        (Path(root) / "tasks.json").write_text(json.dumps(tasks))
        command = [sys.executable, compute.__file__, f"{root}/tasks.json", f"{root}/answers.json"]
        environment = {**os.environ, "HOME": root, "HF_HOME": root, "HF_HUB_OFFLINE": "1"}
        nobody = str(pwd.getpwnam("nobody").pw_uid)
        subprocess.run([*command, nobody], check=True, env=environment, cwd=root)
        answers = json.loads((Path(root) / "answers.json").read_text())
    assert "error" in answers.pop("private")

    for name, case in exported.items():
        assert "error" not in answers[name], f"{name}: {answers[name]}"
        torch.testing.assert_close(torch.tensor(answers[name]["logits"]), case.logits, rtol=1e-5, atol=1e-5)


def front_matter(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_has_data_settings_and_results(exported: dict[str, Exported]) -> None:
    front, body = front_matter(exported["full"].folder)
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["orchestrator", "sft"],
    }
    for line in ("after 4 optimizer steps", "first step | 4.7500", "last step | 4.0000", "tokens read | 400"):
        assert line in body
    assert "evaluation loss | 5.0000 (step 4)" in body
    assert "`builtin/alpaca_sample` (sample 64)" in body
    assert "lr: " in body
    front, body = front_matter(exported["lora"].folder)
    assert (front["library_name"], front["tags"]) == ("peft", ["orchestrator", "sft", "lora"])

    for case in exported.values():
        for file in (case.folder / "README.md", case.folder / MARKER):
            assert "/tmp" not in file.read_text()
            assert str(case.base.parent) not in file.read_text()


def test_only_hub_models_have_a_hub_name() -> None:
    assert hub_name("meta-llama/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"
    for local in (
        "/models/llama",
        "./llama",
        "~/llama",
        "builtin/tiny-llama",
        "tests/exports",
        "a/b/c",
        "a b",
    ):
        assert hub_name(local) is None


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a model into the hub cache as its client does, and set the client offline."""
    name, commit = "owner/model", "0" * 40
    folder = tmp_path / "hub" / "models--owner--model"
    runs.as_transformers_4_writes(runs.write_base(folder / "snapshots" / commit))
    card = "---\nlicense: llama3\nlicense_link: https://example.org\n---\n# Model"
    (folder / "snapshots" / commit / "README.md").write_text(card)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    for module in ("huggingface_hub.constants",):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    return name


@pytest.mark.process
def test_a_hub_model_is_exported_from_the_cache(cached: str, tmp_path: Path) -> None:
    """Uses a subprocess, as the hub client reads its settings at import."""
    script = (
        "import sys; from pathlib import Path; from tests.exports import runs\n"
        "from orchestrator.export.run_exports import export_run\n"
        "here = Path(sys.argv[1])\n"
        "for name, method in (('full', {}), ('lora', {'type': 'lora'})):\n"
        f"    made = runs.write_run(here / 'runs' / name, Path('{cached}'), method=method)\n"
        "    export_run(made.folder, here / name)\n"
    )
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(runs.ROOT),
    }  # fmt: skip
    command = [sys.executable, "-c", script, str(tmp_path)]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True)
    front, _ = front_matter(tmp_path / "full")
    assert (front["base_model"], front["base_model_relation"]) == (cached, "finetune")
    assert (front["license"], front["license_link"]) == ("llama3", "https://example.org")
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    assert config["rope_theta"] == 5.0e5
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert not (tmp_path / "full" / name).is_symlink()
    adapter = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == cached
    assert front_matter(tmp_path / "lora")[0]["base_model_relation"] == "adapter"


def test_a_model_that_is_not_in_the_cache_is_one_error(cached: str) -> None:
    model = JobSpec.model_fields["model"].annotation(path="owner/other")  # type: ignore[misc]
    with pytest.raises(TrainingError, match=r"the files of model\.path=owner/other cannot be downloaded"):
        base_model_dir(model)


def test_a_builtin_model_is_exported_and_a_missing_deepspeed_json_needs_dtype(tmp_path: Path) -> None:
    made = runs.write_run(tmp_path / "runs" / "run", Path("builtin/tiny-llama"), model={"weights": "random"})
    export_run(made.folder, tmp_path / "export")
    assert compute.answer(str(tmp_path / "export"))["special"] == ["<s>", "</s>", "<pad>"]
    (made.folder / "deepspeed.json").unlink()
    with pytest.raises(TrainingError, match="name the dtype with --dtype"):
        export_run(made.folder, tmp_path / "export")
    export_run(made.folder, tmp_path / "export", dtype="fp32")


def test_an_adapter_is_merged_into_its_own_base_model_only(tmp_path: Path) -> None:
    base = runs.write_base(tmp_path / "base")
    made = runs.write_run(tmp_path / "runs" / "run", base, method=LORA)
    shutil.rmtree(base)
    runs.write_base(base, rms_norm_eps=1e-3)
    with pytest.raises(TrainingError, match="is not the base model that the adapter was trained with"):
        export_run(made.folder, tmp_path / "export", merge=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "runs"]

"""Bundled models are found by their aliases and have the published parameter counts."""

import warnings
from typing import Any

import pytest

from orchestrator.arch.parameters import parameters
from orchestrator.arch.registry import UnknownModel, bundled, bundled_config, require_bundled

# transformers has no code for Qwen 1, Baichuan and ChatGLM; these are checked by their published counts only.
IN_TRANSFORMERS = [
    name
    for name, facts in bundled().items()
    if facts["config"]["model_type"] not in ("qwen", "baichuan", "chatglm")
]


@pytest.mark.parametrize("name", bundled())
def test_each_model_has_the_parameters_that_were_published(name: str) -> None:
    found = parameters(bundled()[name]["config"])
    assert found is not None
    assert found.total == bundled()[name]["parameters"]


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_transformers_builds_as_many(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config: dict[str, Any] = dict(bundled()[name]["config"])
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        built = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config.pop("model_type"), **config, pad_token_id=0)
        )
    assert built.num_parameters() == bundled()[name]["parameters"]


def test_twenty_and_more_are_held_to_transformers() -> None:
    assert len(IN_TRANSFORMERS) >= 20


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("meta-llama/Llama-2-7b-hf", "llama2-7b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3-8b"),
        ("Llama2-70B", "llama2-70b"),
        ("Qwen/Qwen-1_8B-Chat", "qwen-1.8b"),
        ("qwen-72b-chat-int4", "qwen-72b"),
        ("Qwen/Qwen1.5-7B-Chat-GPTQ-Int4", "qwen1.5-7b"),
        ("yi-34b-200k", "yi-34b"),
        ("THUDM/chatglm3-6b-32k", "chatglm3-6b"),
        ("mistralai/Mistral-7B-Instruct-v0.1", "mistral-7b"),
        ("mistralai/Mistral-7B-Instruct-v0.2", "mistral-7b-v0.2"),
        ("mistralai/Mistral-7B-v0.3", "mistral-7b-v0.3"),
        ("baichuan2-7b-chat", "baichuan2-7b"),
        ("CohereForAI/c4ai-command-r-plus", "command-r-plus"),
    ],
)
def test_names_as_hubs_and_tables_write_them(written: str, name: str) -> None:
    assert bundled_config(written) == bundled()[name]["config"]


def test_a_model_that_is_not_known_is_named_with_those_that_are() -> None:
    assert bundled_config("gpt-5") is None
    with pytest.raises(UnknownModel, match=r"'gpt-5' is not bundled.*config\.json.*llama2-7b"):
        require_bundled("gpt-5")


def test_each_model_has_a_source_and_a_name_of_its_own() -> None:
    for name, facts in bundled().items():
        assert facts["source"].startswith("https://"), name
        for each in (name, *facts.get("names", ())):
            assert bundled_config(each) is facts["config"]

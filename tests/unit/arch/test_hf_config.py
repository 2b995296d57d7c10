"""config.json is loaded from a folder, the bundled registry, or a hub, in this order."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from orchestrator.arch.hf_config import load_config_json
from orchestrator.arch.registry import require_bundled
from orchestrator.errors import SpecError

SIZES = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "vocab_size": 256,
}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the hub by one with a single model, and return the list of names requested from it."""
    file = tmp_path / "hub.json"
    file.write_text(json.dumps(SIZES))
    names: list[str] = []

    def download(name: str, file_name: str, **_: object) -> str:
        names.append(name)
        if name != "someone/their-model":
            raise LocalEntryNotFoundError(f"{name}/{file_name}")
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return names


def test_a_folder_comes_first(tmp_path: Path, asked: list[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, "hidden_size": 32}))
    assert load_config_json(str(tmp_path))["hidden_size"] == 32
    assert asked == []


def test_what_is_bundled_asks_nobody(asked: list[str]) -> None:
    assert load_config_json("meta-llama/Llama-2-7b-hf") == require_bundled("llama2-7b")
    assert asked == []


def test_a_hub_is_asked_for_the_rest(asked: list[str]) -> None:
    assert load_config_json("someone/their-model") == SIZES
    assert asked == ["someone/their-model"]


@pytest.mark.parametrize("path", ["someone/another", "./someone/folder", "no-such-model", "/no/such/folder"])
def test_what_is_nowhere_is_one_clear_error(path: str, asked: list[str]) -> None:
    with pytest.raises(
        SpecError, match=r"is not a folder with a config\.json.*give a folder, or one of.*llama2-7b"
    ):
        load_config_json(path)
    assert asked == (["someone/another"] if path == "someone/another" else [])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read (not JSON"),
        ("[1]", "is not a JSON object"),
        ("null", "is not a JSON object"),
        ("{}", "is not a JSON object"),
        (json.dumps({"model_type": "llama", "hidden_size": 64}), "does not state num_attention_heads"),
        (json.dumps({**SIZES, "vocab_size": None}), "does not state vocab_size"),
        (json.dumps({**SIZES, "num_hidden_layers": "two"}), 'num_hidden_layers="two"'),
        (json.dumps({**SIZES, "hidden_size": -4}), "hidden_size=-4"),
        (json.dumps({**SIZES, "hidden_size": "wide"}), 'hidden_size="wide"'),
        (json.dumps({**SIZES, "num_attention_heads": 0}), "num_attention_heads=0"),
    ],
)
def test_a_damaged_config_is_one_clear_error(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SpecError) as found:
        load_config_json(str(tmp_path))
    assert words in str(found.value)
    assert str(tmp_path) in str(found.value)
    assert "restore the config.json" in str(found.value)


def test_an_unknown_family_needs_no_sizes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "someones"}')
    assert load_config_json(str(tmp_path)) == {"model_type": "someones"}

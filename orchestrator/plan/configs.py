"""A model's config.json: from a folder, from those that are bundled, or from a hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from orchestrator.errors import SpecError
from orchestrator.paths import resolve
from orchestrator.plan.models import bundled, bundled_config


def local_config(path: str) -> Mapping[str, Any] | None:
    """Return the config.json of a model that lies on this machine; None where there is none to read.

    Args:
        path: `model.path` of a job.
    """
    try:
        found = json.loads((resolve(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def config_of(path: str) -> Mapping[str, Any]:
    """Return a model's config.json.

    Args:
        path: `model.path` of a job: a folder, a name that is bundled, or one on the hub, which is asked last.

    Raises:
        SpecError: It is in none of these places.
    """
    found = local_config(path) or bundled_config(path)
    if found is not None:
        return found
    asked = "is no folder with a config.json"
    if path.count("/") == 1 and not path.startswith((".", "/", "~", "builtin/")):
        found, asked = _from_hub(path), "is no folder with a config.json, and no hub could be asked for it"
    if found is None:
        raise SpecError(
            f"model.path={path} {asked}, so the model's sizes are not known; give a folder, or one of the "
            f"bundled names: {', '.join(bundled())}"
        )
    return found


def _from_hub(name: str) -> Mapping[str, Any] | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        file = hf_hub_download(name, "config.json", etag_timeout=5)
        with open(file, encoding="utf-8") as text:
            found = json.load(text)
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError):
        return None
    return found if isinstance(found, dict) else None

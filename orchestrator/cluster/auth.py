"""Ray token authentication: RAY_AUTH_MODE must be set before Ray is imported."""

from __future__ import annotations

import os


def choose_auth_mode() -> None:
    """Set RAY_AUTH_MODE to `token` if a token is in the environment, else to `disabled`.

    A value that is already set is kept. If it is unset, Ray 2.60 enables token authentication for a local
    start and writes a token into the home directory, which every later `ray start` on the machine then
    requires.
    """
    has_token = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    os.environ.setdefault("RAY_AUTH_MODE", "token" if has_token else "disabled")

"""Whether Ray asks for a token: to be said before Ray is imported, which reads the environment only then."""

from __future__ import annotations

import os


def choose_auth_mode() -> None:
    """Say whether Ray asks for a token: only where the environment brings one, or says so itself.

    With nothing said, Ray 2.60 turns token authentication on for a plain local start and writes a token into
    the home directory, which every later `ray start` on the machine then demands.
    """
    has_token = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    os.environ.setdefault("RAY_AUTH_MODE", "token" if has_token else "disabled")

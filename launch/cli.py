"""The command line, for scripts that call `python -m launch.cli` in a checkout; `launch` is not a package."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from orchestrator.cli.main import app

    app()

"""Entry point of `python -m orchestrator`."""

from orchestrator.cli.main import app

if __name__ == "__main__":
    app()

"""Earlier name of `orchestrator.config.loader`, for scripts that import it; new code imports the loader."""

from orchestrator.config.loader import dump as dump
from orchestrator.config.loader import load as load
from orchestrator.config.loader import parse as parse

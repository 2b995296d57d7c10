"""Earlier name of `orchestrator.submit`, for scripts in a checkout; `launch` is not a package."""

from orchestrator.submit.submit import submit as submit
from orchestrator.submit.working_dir import create_working_dir as _pack_working_dir  # noqa: F401 - scripts import it

"""Earlier name of `orchestrator.submit.submit`, for scripts in a checkout; `launch` is not a package."""

from orchestrator.submit.submit import _pack_working_dir as _pack_working_dir
from orchestrator.submit.submit import submit as submit

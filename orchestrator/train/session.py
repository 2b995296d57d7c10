"""Earlier name of `orchestrator.train.ray_session`, for scripts that import it; new code imports that."""

from orchestrator.train.ray_session import connected as connected
from orchestrator.train.ray_session import live_nodes as live_nodes

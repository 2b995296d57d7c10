#!/usr/bin/env bash
# Wait until a number of nodes have joined the Ray cluster at RAY_ADDRESS.
#
#   RAY_ADDRESS=HEAD_IP:PORT wait-for-nodes.sh COUNT
#
# ORCHESTRATOR_START_SECONDS limits the time; default 300.
set -euo pipefail

if [[ $# -ne 1 ]]; then
    echo "usage: RAY_ADDRESS=HEAD_IP:PORT wait-for-nodes.sh COUNT" >&2
    exit 2
fi
if [[ -n ${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-} ]]; then mode=token; else mode=disabled; fi
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-$mode}
exec "${PYTHON:-python3}" - "$1" "${ORCHESTRATOR_START_SECONDS:-300}" <<'PYTHON'
import sys
import time

import ray

count, deadline = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
alive = 0
while alive < count:
    if time.monotonic() > deadline:
        sys.exit(f"error: {alive} of {count} nodes have joined the Ray cluster in time; see the logs of the others")
    try:
        if not ray.is_initialized():
            ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
        alive = sum(node["Alive"] for node in ray.nodes())
    except ConnectionError:  # the head is not up yet
        pass
    time.sleep(1)
print(f"{alive} nodes have joined the Ray cluster", file=sys.stderr)
PYTHON

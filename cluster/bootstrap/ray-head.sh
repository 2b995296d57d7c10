#!/usr/bin/env bash
# Start the head of a Ray cluster on this node and block until SIGTERM.
#
#   ray-head.sh [RAY START OPTIONS]
#
# Environment:
#   RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH   token authentication is enabled if one is set
#   ORCHESTRATOR_NODE_IP                  address of this node; default from node-ip.sh
#   ORCHESTRATOR_RAY_PORT                 port of the GCS; default 6379
#   ORCHESTRATOR_DASHBOARD_HOST           address of the dashboard; default 127.0.0.1, 0.0.0.0 without a token is unsafe
#   ORCHESTRATOR_RAY_TMP                  folder for sockets and logs; default /tmp/ray
set -euo pipefail

if [[ -n ${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-} ]]; then mode=token; else mode=disabled; fi
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-$mode} RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0}
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
address=${ORCHESTRATOR_NODE_IP:-$("$folder/node-ip.sh")}

# Ray stops its processes on this node when it receives SIGTERM. `ray stop` would also stop those of other clusters.
exec ray start --head --block \
    --node-ip-address="$address" \
    --port="${ORCHESTRATOR_RAY_PORT:-6379}" \
    --dashboard-host="${ORCHESTRATOR_DASHBOARD_HOST:-127.0.0.1}" \
    --temp-dir="${ORCHESTRATOR_RAY_TMP:-/tmp/ray}" \
    "$@"

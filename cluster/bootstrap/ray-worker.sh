#!/usr/bin/env bash
# Join this node to a Ray cluster and block until SIGTERM or until the head is gone.
#
#   ray-worker.sh HEAD_IP:PORT [RAY START OPTIONS]
#
# Environment: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ORCHESTRATOR_NODE_IP as for ray-head.sh;
#   ORCHESTRATOR_START_SECONDS            seconds to wait for the head; default 300
set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "usage: ray-worker.sh HEAD_IP:PORT [RAY START OPTIONS]" >&2
    exit 2
fi
head=$1
shift
if [[ -n ${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-} ]]; then mode=token; else mode=disabled; fi
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-$mode} RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0}
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
address=${ORCHESTRATOR_NODE_IP:-$("$folder/node-ip.sh")}

# `ray start` gives up after seconds if the head is not up yet.
deadline=$((SECONDS + ${ORCHESTRATOR_START_SECONDS:-300}))
until (exec 3<>"/dev/tcp/${head%:*}/${head##*:}") 2>/dev/null; do
    if ((SECONDS >= deadline)); then
        echo "error: no Ray head at $head; check that it is running and that no firewall blocks the port" >&2
        exit 3
    fi
    sleep 1
done
exec ray start --block --address="$head" --node-ip-address="$address" "$@"

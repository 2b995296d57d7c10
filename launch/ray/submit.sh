#!/usr/bin/env bash
# Submit a job to a running Ray cluster and follow its log.
#
#   launch/ray/submit.sh JOB [OPTIONS OF `orchestrator submit`]
#
# Environment:
#   ORCHESTRATOR_DASHBOARD                URL of the dashboard; default http://127.0.0.1:8265
#   RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH   token of a cluster with authentication
set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "usage: launch/ray/submit.sh JOB [OPTIONS OF 'orchestrator submit']" >&2
    exit 2
fi
job=$1
shift
exec orchestrator submit "$job" --address "${ORCHESTRATOR_DASHBOARD:-http://127.0.0.1:8265}" "$@"

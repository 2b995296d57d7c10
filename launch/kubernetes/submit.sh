#!/usr/bin/env bash
# Render a job as a RayJob and apply it to the Kubernetes cluster of the current context.
#
#   launch/kubernetes/submit.sh JOB [OPTIONS OF `orchestrator render --target rayjob`]
#   launch/kubernetes/submit.sh job.yaml --image REGISTRY/orchestrator:0.1.0-cuda --gpus-per-node 8
#
# KUBECTL replaces the command kubectl, e.g. KUBECTL="kubectl --context training".
set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "usage: launch/kubernetes/submit.sh JOB [OPTIONS OF 'orchestrator render --target rayjob']" >&2
    exit 2
fi
read -r -a kubectl <<<"${KUBECTL:-kubectl}"
manifest=$(orchestrator render --target rayjob "$@") # a failed render applies nothing
printf '%s\n' "$manifest" | "${kubectl[@]}" apply --server-side -f -

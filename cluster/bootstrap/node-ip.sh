#!/usr/bin/env bash
# Print the IPv4 address by which other nodes reach this one.
#
# ORCHESTRATOR_INTERFACE selects the network interface, e.g. ib0 or bond0; the default is that of the default route.
set -euo pipefail

if [[ -n ${ORCHESTRATOR_INTERFACE:-} ]]; then
    address=$(ip -o -4 address show dev "$ORCHESTRATOR_INTERFACE" | awk '{split($4, a, "/"); print a[1]; exit}')
else
    # Selects a route without sending a packet.
    address=$(ip -o -4 route get 192.0.2.1 2>/dev/null | awk '{for (i = 1; i < NF; i++) if ($i == "src") print $(i + 1)}')
    address=${address:-$(hostname -I | awk '{print $1}')}
fi
if [[ -z $address ]]; then
    echo "error: no IPv4 address found; set ORCHESTRATOR_INTERFACE to a network interface of this node" >&2
    exit 3
fi
echo "$address"

#!/usr/bin/env bash
# Starts Ray on this node, as the head where HEAD is an address of this node, else as a worker of that head.
#   RAY_AUTH_TOKEN_PATH=FILE recipes/cluster/node.sh HEAD [options of `ray start`, such as --block or --num-gpus=8]
# FILE holds the token that every node and the driver show each other: the same on all, and nobody else's to read.
set -euo pipefail
head=${1:?usage: node.sh HEAD_ADDRESS [options of ray start]}
shift
token=${RAY_AUTH_TOKEN_PATH:?set RAY_AUTH_TOKEN_PATH to a file with a token: openssl rand -hex 32 > FILE; chmod 600 FILE}
test -r "$token" || { echo "$token cannot be read on $(hostname)" >&2; exit 2; }
export RAY_AUTH_MODE=token
port=${RAY_PORT:-6379}
# The address on the network towards the head; Ray would guess, and take 127.0.1.1 where the host's own name says so.
own=$(ip -4 route get "$head" | sed -n 's/.* src \([0-9.]*\).*/\1/p')
test -n "$own" || { echo "$(hostname) has no route to $head" >&2; exit 2; }
options=(--node-ip-address="$own" --disable-usage-stats "$@")
if [ "$own" = "$head" ]; then
    exec ray start --head --port="$port" "${options[@]}"
fi
for _ in $(seq 120); do
    if (exec 3<>"/dev/tcp/$head/$port") 2>/dev/null; then
        exec ray start --address="$head:$port" "${options[@]}"
    fi
    sleep 1
done
echo "$(hostname): nothing answers at $head:$port after 120 s: is the head up, and is the port open?" >&2
exit 1

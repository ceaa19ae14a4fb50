#!/bin/sh
# nats-watch.sh SECONDS COMMAND...: run a nats-server; kill it when it has been unhealthy for SECONDS.
#
# After a failed write (disk full, I/O error) a server freezes that stream until it is restarted, even when there is
# free space again: it keeps its connections and stores nothing. Docker doesn't restart unhealthy containers and systemd
# has no health checks, so this kills the server, and their restart policy starts it. Acknowledged writes are on disk.
# A new server gets START seconds to become healthy: reading a large store takes time.
set -u
health=${NATS_HEALTH:-http://127.0.0.1:8222/healthz}
start=${START:-300}
patience=$1
shift

ask() {
  if command -v wget >/dev/null; then
    exec wget -q -O /dev/null "$health" 2>/dev/null
  else
    exec curl -fs -o /dev/null "$health"
  fi
}

# Takes one second, or five without a response; not every wget has a working timeout.
healthy() {
  ask &
  asking=$!
  for took in 1 2 3 4 5; do
    sleep 1
    if ! kill -0 "$asking" 2>/dev/null; then
      wait "$asking"
      return
    fi
  done
  kill -KILL "$asking"
  return 1
}

watch() {
  waited=0
  until healthy || [ "$waited" -ge "$start" ]; do
    waited=$((waited + took))
  done
  echo "nats-watch: watching the server" >&2
  unhealthy=0
  while [ "$unhealthy" -lt "$patience" ]; do
    if healthy; then unhealthy=0; else unhealthy=$((unhealthy + took)); fi
  done
  echo "nats-watch: unhealthy for $patience s, killing the server so that it is restarted" >&2
  kill -KILL "$broker"
}

"$@" &
broker=$!
trap 'kill -TERM "$broker"' TERM INT
trap 'kill -HUP "$broker"' HUP
watch &
watcher=$!
# A signal to this shell ends the wait, not the server.
wait "$broker"
code=$?
while kill -0 "$broker" 2>/dev/null; do
  wait "$broker"
  code=$?
done
kill "$watcher" 2>/dev/null
exit "$code"

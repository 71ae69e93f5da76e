#!/usr/bin/env bash
# Builds the images where there is no Docker engine and no registry, and runs them: for machines like a CI container.
#
#   docker/build-here.sh [FOLDER]     FOLDER keeps the base and the images; default /tmp/shiwu-images
#
# The base is a stand-in made of Debian packages, under the same name of Python. The Dockerfiles are the real ones. The
# worker then runs as its own user, with its own entrypoint, against a real Redis, and the producer's image asks it about
# a sample picture. What this can't show: NVIDIA's runtime, a container runtime's seccomp profile, a read-only root.
#
# Needs root, buildah, mmdebstrap and redis-server (Debian: apt-get install buildah mmdebstrap redis-server).
# PIP_CONF names a pip.conf for the build, for a mirror; MIRROR a Debian mirror; TORCH_CPU_INDEX_URL another index for
# torch; STORAGE_DRIVER=overlay is quicker than vfs where the machine allows it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

FOLDER=${1:-/tmp/shiwu-images}
MIRROR=${MIRROR:-http://deb.debian.org/debian}
BASE=localhost/python-standin
PORT=${PORT:-7379}
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=${STORAGE_DRIVER:-vfs}

for program in buildah mmdebstrap redis-server redis-cli; do
  command -v "$program" >/dev/null || { echo "missing: $program; see the head of $0" >&2; exit 2; }
done
[ "$(id -u)" = 0 ] || { echo "expected root: chroot isolation needs it" >&2; exit 2; }

mkdir -p "$FOLDER"
FOLDER=$(cd "$FOLDER" && pwd)
STORAGE=(--root "$FOLDER/storage" --runroot "$FOLDER/run")
REDIS_PID='' WORKER_PID='' CONTAINERS=()

b() { buildah "${STORAGE[@]}" "$@"; }
say() { printf '%(%H:%M:%S)T  %s\n' -1 "$*"; }

leave() {
  [ -z "$WORKER_PID" ] || kill "$(tini_below "$WORKER_PID")" 2>/dev/null || true
  [ -z "$REDIS_PID" ] || kill "$REDIS_PID" 2>/dev/null || true
  for one in "${CONTAINERS[@]}"; do b rm "$one" >/dev/null || true; done
}
trap leave EXIT

make_base() {
  if [ ! -s "$FOLDER/python.tar" ]; then
    say "making the stand-in base from $MIRROR"
    mmdebstrap --quiet --variant=minbase --mode=root --include=ca-certificates,python3,python3-venv,python3-pip \
      bookworm "$FOLDER/python.tar.part" \
      "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $MIRROR bookworm main"
    mv "$FOLDER/python.tar.part" "$FOLDER/python.tar"
  fi
  local made
  made=$(b from scratch)
  b add --quiet "$made" "$FOLDER/python.tar" / >/dev/null
  b run --isolation chroot "$made" -- ln -sf python3 /usr/bin/python
  b commit --quiet --rm "$made" "$BASE" >/dev/null
}

build() { # NAME DOCKERFILE [OPTION …]
  local name=$1 file=$2 began=$SECONDS
  shift 2
  printf '{"default":[{"type":"insecureAcceptAnything"}]}' > "$FOLDER/policy.json"
  # The machine's certificates and pip.conf, for a mirror behind a CA of its own.
  local mounts=(-v /etc/ssl/certs:/etc/ssl/certs:ro)
  [ -z "${PIP_CONF:-}" ] || mounts+=(-v "$PIP_CONF:/etc/pip.conf:ro")
  [ ! -d "${WHEELS:-}" ] || mounts+=(-v "$WHEELS:$WHEELS:ro")
  say "building $name"
  b --signature-policy "$FOLDER/policy.json" bud --quiet --isolation chroot --network host --pull-never --layers \
    --format docker "${mounts[@]}" --build-arg "PYTHON_IMAGE=$BASE" "$@" -t "localhost/$name" -f "$file" . \
    >"$FOLDER/$name.log" 2>&1 || { tail -40 "$FOLDER/$name.log" >&2; exit 1; }
  say "built $name in $((SECONDS - began)) s, $(b images --format '{{.Size}}' "localhost/$name") with its base"
}

container() { # IMAGE [OPTION …]: prints its name
  local image=$1
  shift
  b from --pull-never "$@" "localhost/$image"
}

inspect() { b inspect --type image --format "{{$2}}" "localhost/$1"; }

look() { # IMAGE: what every image promises
  local image=$1 user
  user=$(inspect "$image" .OCIv1.Config.User)
  say "$image: user $user, entrypoint $(inspect "$image" .OCIv1.Config.Entrypoint)"
  [ "$user" = 10001:10001 ] || { echo "expected user 10001:10001, got $user" >&2; exit 1; }
  local one
  one=$(container "$image")
  CONTAINERS+=("$one")
  b run --isolation chroot "$one" -- sh -c 'id -u; for tool in gcc cc c++ make; do command -v $tool && exit 1; done; true'
}

run_them() {
  redis-server --port "$PORT" --bind 127.0.0.1 --save '' --appendonly yes --dir "$FOLDER" --logfile "$FOLDER/redis.log" &
  REDIS_PID=$!
  local url=redis://127.0.0.1:$PORT/0 worker producer
  worker=$(container shiwu-worker-cpu)
  producer=$(container shiwu-producer)
  CONTAINERS+=("$worker" "$producer")
  say "starting the worker as its user"
  # buildah run ignores an image's entrypoint, so it is written out here.
  b run --isolation chroot --env "SHIWU_REDIS_URL=$url" --env SHIWU_ALLOW_FOLDERS=/samples --env SHIWU_TORCH_THREADS=1 \
    --env SHIWU_READY_FILE=/tmp/ready -v "$PWD/tests/support/samples:/samples:ro" "$worker" -- \
    /usr/bin/tini -- shiwu-worker >"$FOLDER/worker.log" 2>&1 &
  WORKER_PID=$!
  b run --isolation chroot --env "SHIWU_REDIS_URL=$url" "$producer" -- /usr/bin/tini -- \
    shiwu tag --labels pictogram-zh --timeout 120 file:///samples/1f43c-02.jpg file:///samples/1f355-17.jpg
  say "the worker's health check says:"
  b run --isolation chroot "$worker" -- python -c "$(healthcheck)" && say "ready"
  say "stopping the worker by SIGTERM"
  kill -TERM "$(tini_below "$WORKER_PID")"
  wait "$WORKER_PID" && say "the worker ended with 0" || say "the worker ended with $?"
  WORKER_PID=''
}

tini_below() { # PID: buildah would pass SIGTERM on as SIGKILL, so it goes to the image's own first process
  local pid
  for pid in $(pgrep --parent "$1"); do
    if [ "$(cat "/proc/$pid/comm")" = tini ]; then echo "$pid"; else tini_below "$pid"; fi
  done
}

healthcheck() { sed -n '/^HEALTHCHECK/,/\]$/p' docker/worker.Dockerfile | grep -o 'import.*)"' | sed 's/"$//; s/\\"/"/g'; }

say "STORAGE_DRIVER=$STORAGE_DRIVER, $(buildah --version)"
make_base
build shiwu-producer docker/producer.Dockerfile
build shiwu-worker-cpu docker/worker.Dockerfile --build-arg DEVICE=cpu \
  ${TORCH_CPU_INDEX_URL:+--build-arg "TORCH_CPU_INDEX_URL=$TORCH_CPU_INDEX_URL"}
look shiwu-producer
look shiwu-worker-cpu
run_them

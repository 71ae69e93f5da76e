#!/usr/bin/env bash
# Builds the images where there is no Docker engine and no registry, and runs them: for machines like a CI container.
#
#   docker/build-here.sh [STEP …]     base, producer, worker, look, run; without any: all, in this order
#
# The base is a stand-in made of Debian packages. The Dockerfiles are the real ones. `look` checks what every image
# promises. `run` starts the worker with the image's own user, environment and entrypoint as process 1 on a read-only
# root, without capabilities, against a real Redis; asks it about sample pictures from the producer's image; runs the
# image's health check; and ends the worker by SIGTERM. Any of it that goes wrong ends the script with an error.
#
# What this can't show: the real base, NVIDIA's runtime, a container runtime's own seccomp profile.
#
# Needs root, buildah, mmdebstrap and redis-server (Debian: apt-get install buildah mmdebstrap redis-server).
#   FOLDER               keeps the base and the images; default /tmp/shiwu-images
#   STORAGE_DRIVER       overlay where the machine allows it; vfs, the default, is slow but works everywhere
#   MIRROR, PIP_CONF     a Debian mirror, and a pip.conf for the builds
#   WHEELS               a folder of wheels that pip.conf names, for the builds
#   TORCH_CPU_INDEX_URL  another index for torch
#   REDIS_PORT, HTTP_PORT
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

FOLDER=${FOLDER:-/tmp/shiwu-images}
MIRROR=${MIRROR:-http://deb.debian.org/debian}
BASE=localhost/python-standin
REDIS_PORT=${REDIS_PORT:-7379}
HTTP_PORT=${HTTP_PORT:-9808}
SAMPLES=$PWD/tests/support/samples
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=${STORAGE_DRIVER:-vfs}

for program in buildah mmdebstrap redis-server redis-cli unshare pgrep python3; do
  command -v "$program" >/dev/null || { echo "missing: $program; see the head of $0" >&2; exit 2; }
done
[ "$(id -u)" = 0 ] || { echo "expected root: chroot isolation needs it" >&2; exit 2; }

mkdir -p "$FOLDER"
FOLDER=$(cd "$FOLDER" && pwd)
STORAGE=(--root "$FOLDER/storage" --runroot "$FOLDER/run")
REDIS_PID='' WORKER_PID='' CONTAINERS=() CONTAINER=''

b() { buildah "${STORAGE[@]}" "$@"; }
say() { printf '%(%H:%M:%S)T  %s\n' -1 "$*"; }
fail() { echo "$*" >&2; exit 1; }

leave() {
  [ -z "$WORKER_PID" ] || kill -KILL "$WORKER_PID" 2>/dev/null || true
  [ -z "$REDIS_PID" ] || kill "$REDIS_PID" 2>/dev/null || true
  wait 2>/dev/null || true
  for one in "${CONTAINERS[@]}"; do b rm "$one" >/dev/null || true; done
}
trap leave EXIT

step_base() {
  local began=$SECONDS made
  if [ ! -s "$FOLDER/python.tar" ]; then
    say "making the stand-in base from $MIRROR"
    mmdebstrap --quiet --variant=minbase --mode=root --include=ca-certificates,python3,python3-venv,python3-pip \
      bookworm "$FOLDER/python.tar.part" \
      "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $MIRROR bookworm main"
    mv "$FOLDER/python.tar.part" "$FOLDER/python.tar"
  fi
  made=$(b from scratch)
  b add --quiet "$made" "$FOLDER/python.tar" / >/dev/null
  b run --isolation chroot "$made" -- ln -sf python3 /usr/bin/python
  b commit --quiet --rm "$made" "$BASE" >/dev/null
  say "the base: $((SECONDS - began)) s, $(size "$BASE")"
}

step_producer() { build shiwu-producer docker/producer.Dockerfile; }

step_worker() {
  build shiwu-worker-cpu docker/worker.Dockerfile --build-arg DEVICE=cpu \
    ${TORCH_CPU_INDEX_URL:+--build-arg "TORCH_CPU_INDEX_URL=$TORCH_CPU_INDEX_URL"}
}

build() { # NAME DOCKERFILE [OPTION …]
  local name=$1 file=$2 began=$SECONDS
  shift 2
  printf '{"default":[{"type":"insecureAcceptAnything"}]}' > "$FOLDER/policy.json"
  # The machine's certificates and pip.conf, for a mirror behind a CA of its own.
  local mounts=(-v /etc/ssl/certs:/etc/ssl/certs:ro)
  [ -z "${PIP_CONF:-}" ] || mounts+=(-v "$PIP_CONF:/etc/pip.conf:ro")
  [ -z "${WHEELS:-}" ] || mounts+=(-v "$WHEELS:$WHEELS:ro")
  say "building $name"
  b --signature-policy "$FOLDER/policy.json" bud --quiet --isolation chroot --network host --pull-never --layers \
    --format docker "${mounts[@]}" --build-arg "PYTHON_IMAGE=$BASE" "$@" -t "localhost/$name" -f "$file" . \
    >"$FOLDER/$name.log" 2>&1 || { tail -40 "$FOLDER/$name.log" >&2; exit 1; }
  say "built $name in $((SECONDS - began)) s, $(size "localhost/$name") with the base's $(size "$BASE")"
}

size() { b images --format '{{.Size}}' "$1"; }

container() { # IMAGE: makes $CONTAINER, which goes when the script ends
  CONTAINER=$(b from --pull-never "localhost/$1")
  CONTAINERS+=("$CONTAINER")
}

config() { # IMAGE LIST: one entry of the image's configuration a line
  b inspect --type image --format "{{range .Docker.Config.$2}}{{println .}}{{end}}" "localhost/$1" | sed '/^$/d'
}

step_look() { look shiwu-producer; look shiwu-worker-cpu; }

look() { # IMAGE: a user without rights, no tools to build or install with, nothing that this user may write to
  local image=$1 user found
  user=$(b inspect --type image --format '{{.Docker.Config.User}}' "localhost/$image")
  [ "$user" = 10001:10001 ] || fail "$image: expected user 10001:10001, got $user"
  container "$image"
  found=$(inside 'id -u; id -g; id -G')
  [ "$found" = $'10001\n10001\n10001' ] || fail "$image: expected to run as 10001 in its own group alone, got $found"
  # shellcheck disable=SC2016  # the inner shell expands it
  found=$(inside 'for tool in gcc cc c++ ld make git curl wget; do command -v $tool; done; true')
  [ -z "$found" ] || fail "$image: expected no $found"
  # Debian's pip is the stand-in's; that of the real base lies in /usr/local and is removed.
  found=$(inside 'ls /opt/shiwu/bin /usr/local/lib/python3*/site-packages 2>/dev/null | grep -x "pip.*"; true')
  [ -z "$found" ] || fail "$image: expected no $found"
  # Only the image's own file system: chroot isolation mounts /proc, /dev and /sys over it.
  found=$(inside 'find / -xdev ! -type l -writable 2>/dev/null; true')
  found=$(sort <<<"$found" | paste -sd' ')
  [ "$found" = '/run/lock /tmp /var/tmp' ] \
    || fail "$image: expected nothing but /run/lock /tmp /var/tmp to be writable, got $found"
  say "$image: runs as $user; no compiler, no pip; may write to $found"
}

inside() { b run --isolation chroot "$CONTAINER" -- sh -c "$1"; }

confined() { # IMAGE ROOT [NAME=VALUE …] -- COMMAND …: as process 1 of the image's user on its root, read-only
  local image=$1 root=$2 env=() options=()
  shift 2
  mapfile -t env < <(config "$image" Env)
  while [ "$1" != -- ]; do env+=("$1"); shift; done
  shift
  options=(--reuid 10001 --regid 10001 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all)
  # shellcheck disable=SC2016  # the inner shell expands it
  exec unshare --mount --pid --fork --kill-child bash -ceu '
    root=$1 samples=$2
    shift 2
    mount --make-rprivate /
    mount --bind "$root" "$root"
    mount -o remount,bind,ro "$root"
    mount -t proc proc "$root/proc"
    mount --bind /dev "$root/dev"
    mount -t tmpfs -o size=512m,mode=1777 shm "$root/dev/shm"
    mount -t tmpfs -o size=256m,mode=1777 tmp "$root/tmp"
    mkdir "$root/tmp/samples"
    mount --bind "$samples" "$root/tmp/samples"
    mount -o remount,bind,ro "$root/tmp/samples"
    exec "$@"' confined "$root" "$SAMPLES" env -i "${env[@]}" chroot "$root" setpriv "${options[@]}" -- "$@"
}

step_run() {
  local url=redis://127.0.0.1:$REDIS_PORT/0 worker_root producer health code asked=() deadline entry=()
  redis-server --port "$REDIS_PORT" --bind 127.0.0.1 --save '' --appendonly yes --dir "$FOLDER" \
    --logfile "$FOLDER/redis.log" &
  REDIS_PID=$!
  deadline=$((SECONDS + 20))
  until redis-cli -p "$REDIS_PORT" ping >/dev/null 2>&1; do
    [ $SECONDS -lt $deadline ] || fail "expected Redis on port $REDIS_PORT within 20 s; see $FOLDER/redis.log"
    sleep 0.1
  done
  container shiwu-worker-cpu
  worker_root=$(b mount "$CONTAINER")
  container shiwu-producer
  producer=$CONTAINER

  say "starting the worker: its user, a read-only root, no capabilities"
  mapfile -t entry < <(config shiwu-worker-cpu Entrypoint)
  confined shiwu-worker-cpu "$worker_root" "SHIWU_REDIS_URL=$url" SHIWU_ALLOW_FOLDERS=/tmp/samples \
    SHIWU_TORCH_THREADS=1 "SHIWU_HTTP_PORT=$HTTP_PORT" -- "${entry[@]}" >"$FOLDER/worker.log" 2>&1 &
  WORKER_PID=$!

  mapfile -t asked < <(references 熊猫 狗脸 火箭)
  # buildah run leaves an image's entrypoint out, so it is written here.
  mapfile -t entry < <(config shiwu-producer Entrypoint)
  b run --isolation chroot --env "SHIWU_REDIS_URL=$url" --env TINI_SUBREAPER=1 "$producer" -- "${entry[@]}" \
    tag --labels pictogram-zh --timeout 120 --json "${asked[@]}" >"$FOLDER/answers.jsonl" \
    || fail "the producer ended with $?; see $FOLDER/answers.jsonl and $FOLDER/worker.log"
  judge "$FOLDER/answers.jsonl" "${#asked[@]}"

  mapfile -t health < <(config shiwu-worker-cpu Healthcheck.Test)
  say "the image's health check"
  (confined shiwu-worker-cpu "$worker_root" "SHIWU_HTTP_PORT=$HTTP_PORT" -- "${health[@]:1}") \
    || fail "expected the health check to find the worker ready; see $FOLDER/worker.log"

  say "stopping the worker by SIGTERM"
  kill -TERM "$(pgrep --parent "$WORKER_PID")"
  code=0
  wait "$WORKER_PID" || code=$?
  WORKER_PID=''
  [ "$code" = 0 ] || fail "expected the worker to end with 0, got $code; see $FOLDER/worker.log"
  say "the worker ended with 0"
}

references() { # WORD …: samples that show it, as the worker sees them
  python3 - "$SAMPLES" "$@" <<'PYTHON'
import json, pathlib, sys
rows = json.loads((pathlib.Path(sys.argv[1]) / "samples.json").read_text(encoding="utf-8"))
for word in sys.argv[2:]:
    print(next(f"file:///tmp/samples/{row['file']}" for row in rows if row["label"] == word))
PYTHON
}

judge() { # FILE COUNT: every answer names what its picture shows
  python3 - "$SAMPLES" "$@" <<'PYTHON'
import json, pathlib, sys
rows = json.loads((pathlib.Path(sys.argv[1]) / "samples.json").read_text(encoding="utf-8"))
words = {row["file"]: row["label"] for row in rows}
answers = [json.loads(line) for line in pathlib.Path(sys.argv[2]).read_text(encoding="utf-8").splitlines()]
for answer in answers:
    best = answer["tags"][0]
    reference = answer["image"]["reference"]
    print(f"          {reference}  {best['label']} {best['score']:.3f}  encode {answer['timing']['encode']} ms")
    if best["label"] != words[reference.rpartition("/")[2]]:
        sys.exit(f"expected {words[reference.rpartition('/')[2]]}")
if len(answers) != int(sys.argv[3]):
    sys.exit(f"expected {sys.argv[3]} answers, got {len(answers)}")
PYTHON
}

[ $# -gt 0 ] || set -- base producer worker look run
for step in "$@"; do
  declare -F "step_$step" >/dev/null || fail "expected base, producer, worker, look or run, got $step"
done
say "STORAGE_DRIVER=$STORAGE_DRIVER, $(buildah --version)"
for step in "$@"; do "step_$step"; done

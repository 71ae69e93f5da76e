#!/usr/bin/env bash
# Builds the images where there is no Docker engine and no registry, and runs them: for machines like a CI container.
#
#   docker/build-here.sh [STEP …]     base, producer, worker, look, run; without any: all, in this order
#
# The base is a stand-in made of Debian packages. The Dockerfiles are the real ones. `look` checks what every image
# promises, by buildah under chroot isolation. `run` starts the worker as compose.yaml does, by podman and runc: the
# image's own user and entrypoint, a read-only root, no capabilities, the runtime's seccomp profile. A real Redis stands
# beside it; the producer's image tags sample images; the image's health check is run; SIGTERM ends the worker.
# Any of it that goes wrong ends the script with an error. What this can't show: the real base, and NVIDIA's runtime.
# docker/compose-here.sh goes on from here: it runs compose.yaml itself.
#
# Needs root and (Debian) apt-get install --no-install-recommends buildah mmdebstrap podman runc netavark
# redis-server.
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
WORKER=shiwu-here-worker
REDIS_PORT=${REDIS_PORT:-7379}
HTTP_PORT=${HTTP_PORT:-9808}
SAMPLES=$PWD/tests/support/samples
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=${STORAGE_DRIVER:-vfs}
# Without systemd the health check has no scheduler.
export CONTAINERS_CONF=$PWD/docker/here.conf DISABLE_HC_SYSTEMD=true

for program in buildah mmdebstrap podman runc redis-server redis-cli python3; do
  command -v "$program" >/dev/null || { echo "missing: $program; see the head of $0" >&2; exit 2; }
done
[ "$(id -u)" = 0 ] || { echo "expected root: mmdebstrap and chroot isolation need it" >&2; exit 2; }

mkdir -p "$FOLDER"
FOLDER=$(cd "$FOLDER" && pwd)
STORAGE=(--root "$FOLDER/storage" --runroot "$FOLDER/run")
REDIS_PID='' CONTAINERS=() CONTAINER=''

b() { buildah "${STORAGE[@]}" "$@"; }
p() { podman "${STORAGE[@]}" --storage-driver "$STORAGE_DRIVER" "$@"; }
say() { printf '%(%H:%M:%S)T  %s\n' -1 "$*"; }
fail() { echo "$*" >&2; exit 1; }

leave() {
  p rm --force --ignore --time 1 "$WORKER" >/dev/null || true
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

size() { b images --format '{{.Size}}' "$1" | sed -n 1p; } # an image of two names is listed twice

container() { # IMAGE: makes $CONTAINER, which goes when the script ends
  CONTAINER=$(b from --pull-never "localhost/$1")
  CONTAINERS+=("$CONTAINER")
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

hardened() { # [OPTION …] IMAGE [ARGUMENT …]: as compose.yaml runs our containers, on this machine's network
  p run --pull never --network host --read-only --read-only-tmpfs=false --cap-drop ALL \
    --security-opt no-new-privileges --tmpfs /tmp:size=256m,mode=1777 --shm-size 512m \
    --env "SHIWU_REDIS_URL=redis://127.0.0.1:$REDIS_PORT/0" "$@"
}

step_run() {
  local asked=() deadline code
  redis-server --port "$REDIS_PORT" --bind 127.0.0.1 --save '' --appendonly yes --dir "$FOLDER" \
    --logfile "$FOLDER/redis.log" &
  REDIS_PID=$!
  deadline=$((SECONDS + 20))
  until redis-cli -p "$REDIS_PORT" ping >/dev/null 2>&1; do
    [ $SECONDS -lt $deadline ] || fail "expected Redis on port $REDIS_PORT within 20 s; see $FOLDER/redis.log"
    sleep 0.1
  done

  say "starting the worker: its own user, a read-only root, no capabilities"
  hardened --detach --name "$WORKER" --volume "$SAMPLES:/samples:ro" --env SHIWU_ALLOW_FOLDERS=/samples \
    --env "SHIWU_HTTP_PORT=$HTTP_PORT" --env SHIWU_GRACE_S=20 localhost/shiwu-worker-cpu >/dev/null

  mapfile -t asked < <(references 熊猫 汉堡 火箭)
  hardened --rm localhost/shiwu-producer tag --labels everyday-zh --timeout 120 --json "${asked[@]}" \
    >"$FOLDER/answers.jsonl" || fail "the producer ended with $?; $(p logs "$WORKER" 2>&1 | tail -20)"
  check_answers "$FOLDER/answers.jsonl" "${#asked[@]}"

  p exec "$WORKER" grep -E '^(Uid|CapEff|NoNewPrivs|Seccomp):' /proc/1/status | paste -sd' '
  p healthcheck run "$WORKER" || fail "expected the health check to find the worker ready"
  say "the image's health check finds it ready"

  say "stopping the worker by SIGTERM"
  p stop --time 30 "$WORKER" >/dev/null
  p logs "$WORKER" >"$FOLDER/worker.log" 2>&1
  code=$(p inspect --format '{{.State.ExitCode}}' "$WORKER")
  [ "$code" = 0 ] || fail "expected the worker to end with 0, got $code; see $FOLDER/worker.log"
  say "the worker ended with 0"
}

references() { # WORD …: samples that show it, as the worker sees them
  python3 - "$SAMPLES" "$@" <<'PYTHON'
import json, pathlib, sys
rows = json.loads((pathlib.Path(sys.argv[1]) / "samples.json").read_text(encoding="utf-8"))
for word in sys.argv[2:]:
    print(next(f"file:///samples/{row['file']}" for row in rows if row["label"] == word))
PYTHON
}

check_answers() { # FILE COUNT: every answer names the subject of its image
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

#!/bin/sh
# Starts Valkey with the users of redis-acl.conf: valkey-users.sh FILE ARGUMENTS OF THE SERVER …
#
# REDIS_<ROLE>_PASSWORD has the password of the user shiwu-<role>; without one this user cannot log in. The server reads
# the users from standard input, because every process of a machine may read arguments.
set -eu

users() {
  grep '^user ' "$1" | while read -r word name rights; do
    role=${name#shiwu-}
    if [ "$role" != "$name" ]; then
      variable=REDIS_$(echo "$role" | tr a-z A-Z)_PASSWORD
      password=$(printenv "$variable" || true)
      case $rights in
        "on >change-me-$role "*) rights=${rights#"on >change-me-$role "} ;;
        *) echo "$1: user $name: expected on >change-me-$role, got other words" >&2; exit 64 ;;
      esac
      case $password in
        '') rights="off $rights" ;;
        *[!A-Za-z0-9._~-]*)
          echo "$variable: expected letters, digits and . _ ~ - only, which a URL takes as they are" >&2
          exit 64
          ;;
        *) rights="on >$password $rights" ;;
      esac
    fi
    printf '%s\n' "$word $name $rights"
  done
}

lines=$(users "$1")
shift
set -- valkey-server - "$@"
if [ "$(id -u)" = 0 ] && command -v docker-entrypoint.sh >/dev/null; then
  # The image's own entry point gives a server that is started as root a user of its own.
  set -- docker-entrypoint.sh "$@"
fi
exec "$@" <<END
$lines
END

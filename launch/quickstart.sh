#!/usr/bin/env bash
# From a machine with only Python (3.11 or later) and git to a report: makes .venv, installs, trains, draws, scores.
#
#   ./launch/quickstart.sh                              all of it
#   ./launch/quickstart.sh --smoke                      a few steps of everything
#   ./launch/quickstart.sh --workdir=runs/mine --seed=1
#
# Arguments go to `python -m unclip_jax.quickstart`. Run again, it installs only what has changed, and goes on where it
# was stopped.
#
# UNCLIP_VENV     where the virtual environment is made or found (.venv)
# UNCLIP_PYTHON   what makes it (the first of python3.12, python3.11, python3 that will do)
# UNCLIP_EXTRAS   extras of setup.py, such as cuda12 or tpu
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${UNCLIP_VENV:-.venv}
python=$venv/bin/python
extras=${UNCLIP_EXTRAS:-}

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

suitable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; }

find_python() {
  local candidate
  if [ -n "${UNCLIP_PYTHON:-}" ]; then
    suitable "$UNCLIP_PYTHON" || fail "UNCLIP_PYTHON=$UNCLIP_PYTHON is not Python 3.11 or later"
    printf '%s' "$UNCLIP_PYTHON"
    return
  fi
  for candidate in python3.12 python3.11 python3 python; do
    if suitable "$candidate"; then
      printf '%s' "$candidate"
      return
    fi
  done
  fail "Python 3.11 or later is needed; install it (Debian: apt-get install python3), or name it by UNCLIP_PYTHON"
}

make_venv() {
  local base
  base=$(find_python)
  echo "making $venv with $("$base" --version)" >&2
  if ! "$base" -c 'import ensurepip' 2> /dev/null; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
      fail "$base cannot make virtual environments; install its venv package (Debian: apt-get install python3-venv)"
    fi
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends python3-venv; } \
      > /dev/null || fail "could not install the package python3-venv, which makes virtual environments"
  fi
  "$base" -m venv "$venv"
}

# The stamp says what was installed. It is written last, so that a broken installation is done again. What
# launch/test.sh installs has everything that this needs.
wanted="$(cksum setup.py pyproject.toml)"
installed() {
  [ -x "$python" ] || return 1
  [ "$(cat "$venv/installed-quickstart" 2> /dev/null)" = "$wanted $extras" ] && return 0
  [ -z "$extras" ] && [ "$(cat "$venv/installed" 2> /dev/null)" = "$wanted" ]
}

if ! installed; then
  began=$SECONDS
  [ -x "$python" ] || make_venv
  echo "installing into $venv: about 3 GB, once" >&2
  "$python" -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}"
  printf '%s\n' "$wanted $extras" > "$venv/installed-quickstart"
  echo "installed in $((SECONDS - began)) s" >&2
fi

exec "$python" -m unclip_jax.quickstart "$@"

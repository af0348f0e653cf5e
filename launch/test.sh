#!/usr/bin/env bash
# Installs what the tests need and runs every check: shellcheck, hadolint, ruff, mypy, pytest.
#
#   ./launch/test.sh                          everything
#   ./launch/test.sh tests/config_test.py     only these tests; arguments go to pytest
#
# UNCLIP_VENV    where the virtual environment is made or found (.venv)
# UNCLIP_PYTHON  what makes it (python3)
# UNCLIP_JOBS    pytest's processes (one for each core)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${UNCLIP_VENV:-.venv}
python=$venv/bin/python

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# System packages: installed where that is possible, else named.
need() {
  local package=$1 why=$2
  if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    say "apt-get install $package"
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends "$package"; } \
      > /dev/null || fail "could not install the package $package, $why"
  else
    fail "please install the package $package, $why"
  fi
}

has_emoji_font() { "$python" -c 'from unclip_jax.data import emoji; emoji.find_font()' 2> /dev/null; }

has_torch() { "$python" -c 'import importlib.metadata as m; m.version("torch")' 2> /dev/null; }

# The tests want torch for the CPU only, and PyPI's for Linux brings gigabytes of CUDA: one from a folder of wheels that
# pip is set to look in, or from PyTorch's own index. Where there is neither, PyPI's does as well.
install_torch() {
  [ "$(uname -s)" = Linux ] || return 0
  local pip=("$python" -m pip --quiet --quiet --disable-pip-version-check install --no-deps)
  "${pip[@]}" --no-index 'torch>=2.13.0' 2> /dev/null \
    || "${pip[@]}" --retries 0 --index-url https://download.pytorch.org/whl/cpu 'torch>=2.13.0' 2> /dev/null \
    || echo "no build of torch for the CPU found; taking PyPI's"
}

install() {
  local began=$SECONDS wanted
  wanted=$(cksum setup.py pyproject.toml)
  if [ "$(cat "$venv/installed" 2> /dev/null)" = "$wanted" ]; then return; fi
  if [ ! -x "$python" ]; then
    say "making $venv"
    "${UNCLIP_PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
      || fail "Python 3.11 or later is needed; name one by UNCLIP_PYTHON"
    "${UNCLIP_PYTHON:-python3}" -c 'import ensurepip' 2> /dev/null || need python3-venv "which makes virtual environments"
    "${UNCLIP_PYTHON:-python3}" -m venv "$venv"
  fi
  say "installing into $venv"
  "$python" -m pip install --quiet --quiet --disable-pip-version-check --upgrade pip
  has_torch || install_torch
  "$python" -m pip install --quiet --quiet --disable-pip-version-check --editable '.[test,parity,plan]'
  printf '%s\n' "$wanted" > "$venv/installed"
  echo "installed in $((SECONDS - began)) s"
}

check() {
  local name=$1 began=$SECONDS status=passed
  shift
  say "$*"
  "$@" || { status=FAILED; failed=1; }
  summary+="$(printf '%-12s %s  %4d s' "$name" "$status" $((SECONDS - began)))"$'\n'
}

install
has_emoji_font || need fonts-noto-color-emoji "whose pictures are a data set"
command -v chromium > /dev/null || command -v google-chrome > /dev/null \
  || need chromium "in which the page for raters is tested"
command -v shellcheck > /dev/null || need shellcheck "which checks the scripts in launch/"

failed=0
summary=
if [ $# = 0 ]; then
  check shellcheck shellcheck launch/*.sh launch/*.sbatch .ci/run
  check hadolint "$venv/bin/hadolint" launch/Dockerfile
  check ruff "$python" -m ruff check .
  # Beside pytest: it takes a minute of one core, and there are others.
  types=$(mktemp)
  "$python" -m mypy > "$types" 2>&1 &
  mypy=$!
  trap 'kill "$mypy" 2> /dev/null || true; rm -f "$types"' EXIT
fi
check pytest "$python" -m pytest -n "${UNCLIP_JOBS:-auto}" --dist worksteal "$@"
if [ $# = 0 ]; then
  check mypy wait "$mypy"
  cat "$types"
fi
say summary
printf '%s' "$summary"
exit $failed

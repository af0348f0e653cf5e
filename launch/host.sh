#!/usr/bin/env bash
# What a TPU VM's host does; launch/tpu_vm.sh and launch/queued_resource.sh copy the checkout there and call this.
#
#   host.sh install [--bucket=gs://NAME]     Python 3.12, this checkout and its packages; the bucket, to read, at /bucket
#   host.sh start JOB PROGRAM [--option=…]   the program as the service unclip_jax; JOB is a word that names it
#
# As a service the program outlives the connection that started it, and a machine that is shut down, as a spot VM is,
# sends it SIGTERM and waits for it. Its output is in ~/unclip_jax.log; `systemctl show unclip_jax` knows how it ended.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
checkout=$PWD
export PATH="$HOME/.local/bin:$PATH"

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# The images of TPU VMs have Python 3.10; uv brings its own.
install_packages() {
  command -v uv > /dev/null || python3 -m pip install --quiet --user uv 2> /dev/null \
    || python3 -m pip install --quiet --user --break-system-packages uv
  [ -x .venv/bin/python ] || uv venv --quiet --python 3.12 .venv
  uv pip install --quiet --python .venv/bin/python --editable '.[tpu]'
}

# Read-only: gcsfuse has no atomic rename of folders, on which checkpoints rely. Programs write to gs://… themselves.
mount_bucket() {
  local bucket=${1#gs://} release keyring=/usr/share/keyrings/cloud.google.asc source=https://packages.cloud.google.com/apt
  mountpoint --quiet /bucket && return
  if ! command -v gcsfuse > /dev/null; then
    release=$(lsb_release --codename --short)
    curl --fail --silent --show-error "$source/doc/apt-key.gpg" | sudo tee "$keyring" > /dev/null
    echo "deb [signed-by=$keyring] $source gcsfuse-$release main" \
      | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
    sudo apt-get -qq update
    sudo DEBIAN_FRONTEND=noninteractive apt-get -qq -y install gcsfuse
  fi
  sudo mkdir -p /bucket
  sudo chown "$USER" /bucket
  gcsfuse --implicit-dirs -o ro "$bucket" /bucket
}

metadata() {
  curl --fail --silent --show-error --retry 5 --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

# Where the hosts meet: the one that several slices have in common, else the slice's first. A list has name:number:address
# or only address for each host. How many there are and which one this is, JAX reads from the same place by itself.
coordinator() {
  local address endpoints
  address=$(metadata tpu-env | sed -n "s/^MEGASCALE_COORDINATOR_ADDRESS: *'\{0,1\}\([^':]*\).*/\1/p")
  if [ -z "$address" ]; then
    endpoints=$(metadata worker-network-endpoints)
    address=${endpoints%%,*}
    address=${address##*:}
  fi
  printf '%s:8482' "$address"
}

start() {
  local job=$1 program=$2 meeting
  shift 2
  [ -x .venv/bin/python ] || fail "$checkout is not installed; run launch/host.sh install first"
  meeting=$(coordinator)
  sudo systemctl stop unclip_jax 2> /dev/null || true
  sudo systemctl reset-failed unclip_jax 2> /dev/null || true
  # SIGTERM goes to Python alone (mixed), which stops its loader's processes itself. After=network: stopped before it is.
  sudo systemd-run --quiet --unit=unclip_jax --description="$job" --remain-after-exit \
    --property="User=$USER" --property="WorkingDirectory=$checkout" \
    --property=KillMode=mixed --property=TimeoutStopSec=120 --property=After=network-online.target \
    --property=LimitMEMLOCK=infinity --property=LimitNOFILE=1048576 \
    --property="StandardOutput=append:$HOME/unclip_jax.log" --property="StandardError=append:$HOME/unclip_jax.log" \
    --setenv=PYTHONUNBUFFERED=1 --setenv=UNCLIP_JOIN_SECONDS=900 --setenv="HOME=$HOME" \
    --setenv="JAX_COORDINATOR_ADDRESS=$meeting" \
    "$checkout/.venv/bin/python" -m "unclip_jax.$program" "$@"
}

case ${1:-} in
  install)
    install_packages
    case ${2:-} in
      '') ;;
      --bucket=gs://?*) mount_bucket "${2#--bucket=}" ;;
      *) fail "host.sh install takes --bucket=gs://NAME and nothing else, not $2" ;;
    esac
    ;;
  start)
    [ $# -ge 3 ] || fail "give host.sh start a job's name and a program"
    start "${@:2}"
    ;;
  *) fail "host.sh is for install and start, not '${1:-}'" ;;
esac

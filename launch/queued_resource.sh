#!/usr/bin/env bash
# Launches a program on one TPU slice or several, asked for as a queued resource: waits until Cloud TPU has them, then
# does as tpu_vm.sh. Meant for spot: where the slices are taken away, it asks again and the job goes on from its last save.
#
#   ./launch/queued_resource.sh --project=my-project --zone=us-east5-a --name=decoder --type=v5p-512 --spot \
#       --bucket=gs://my-bucket train --config=configs/decoder.py:paper --workdir=gs://my-bucket/runs/decoder \
#       --config.frozen.clip=gs://my-bucket/runs/clip --config.data.dataset=/bucket/data/mine
#
# It may be ended and run again at any time: it goes on with the request and the job that it finds. A queued resource is
# billed from the moment that it is ACTIVE, and one that waits forever takes the slices when nobody looks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/command_line.sh
. launch/command_line.sh
# shellcheck source=launch/tpu_types.sh
. launch/tpu_types.sh
# shellcheck source=launch/tpu_hosts.sh
. launch/tpu_hosts.sh

define_tpu_options
define slices 1 "how many slices the job runs on"
define_flag spot "cheaper, and taken away at any moment; the job goes on with the next ones"
define_flag reserved "from a reservation of the project"
define valid-until "" "give up waiting after this time, such as 12h (by default never)"
read_options "$@"
check_tpu_options
check_number slices
[ -z "${option[spot]}" ] || [ -z "${option[reserved]}" ] || fail "--spot and --reserved exclude each other"
[[ "${option[valid-until]}" =~ ^([1-9][0-9]*[smhd])?$ ]] \
  || fail "--valid-until is '${option[valid-until]}'; a time is written like 90m, 12h or 2d"
need_tools gcloud git

tpu=(gcloud compute tpus queued-resources)
hosts=(--node=all --worker=all)
deleted=(--force)
ask_state=("${tpu[@]}" describe "${option[name]}" "${where[@]}" "--format=value(state.state)")

ask_slices=(gcloud compute tpus tpu-vm list "${where[@]}"
  "--filter=queuedResource~/queuedResources/${option[name]}$" "--format=value(state)")

# One slice of several may be taken away while the whole is still called active.
slices_state() {
  local states
  states=$("${ask_slices[@]}") || { echo unknown; return; }
  case $states in *PREEMPTED* | *TERMINATED*) echo lost ;; *) echo ready ;; esac
}

known_state() {
  case $1 in
    ACTIVE) slices_state ;;
    CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING) echo waiting ;;
    SUSPENDING | DELETING) echo leaving ;;
    SUSPENDED | FAILED) echo lost ;;
    *) echo "$1" ;;
  esac
}

if [ "${option[do]}" = run ]; then
  created=("--accelerator-type=$tpu_accelerator_type" "--runtime-version=${option[runtime]:-$tpu_runtime}")
  if [ "${option[slices]}" = 1 ]; then
    created+=("--node-id=${option[name]}")
  else
    created+=("--node-count=${option[slices]}" "--node-prefix=${option[name]}")
  fi
  [ -z "${option[spot]}" ] || created+=(--spot)
  [ -z "${option[reserved]}" ] || created+=(--reserved)
  [ -z "${option[valid-until]}" ] || created+=("--valid-until-duration=${option[valid-until]}")
  network_options
fi
do_it

#!/usr/bin/env bash
# Launches a program on all hosts of a TPU VM: makes the TPU, installs this checkout, runs, and deletes the TPU.
#
#   ./launch/tpu_vm.sh --project=my-project --zone=us-east5-a --name=clip --type=v6e-8 --bucket=gs://my-bucket \
#       train --config=configs/clip.py:small --workdir=gs://my-bucket/runs/clip --config.data.dataset=/bucket/data/mine
#
# Run again, it goes on with what it finds: a TPU that is there, a job that runs. It starts the job again where that
# stopped after saving (exit code 42) and makes the TPU again where a spot one was taken away. For slices that are hard
# to get, and for several of them, see queued_resource.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/command_line.sh
. launch/command_line.sh
# shellcheck source=launch/tpu_types.sh
. launch/tpu_types.sh
# shellcheck source=launch/tpu_hosts.sh
. launch/tpu_hosts.sh

define_tpu_options
define_flag spot "cheaper, and taken away at any moment; the job goes on with the next one"
read_options "$@"
check_tpu_options
need_tools gcloud git

tpu=(gcloud compute tpus tpu-vm)
hosts=(--worker=all)
deleted=()
ask_slices=()
ask_state=("${tpu[@]}" describe "${option[name]}" "${where[@]}" "--format=value(state)")

known_state() {
  case $1 in
    READY) echo ready ;;
    CREATING | STARTING | RESTARTING | REPAIRING) echo waiting ;;
    STOPPING | DELETING) echo leaving ;;
    PREEMPTED | TERMINATED) echo lost ;;
    *) echo "$1" ;;
  esac
}

if [ "${option[do]}" = run ]; then
  created=("--accelerator-type=$tpu_accelerator_type" "--version=${option[runtime]:-$tpu_runtime}")
  [ -z "${option[spot]}" ] || created+=(--spot)
  network_options
fi
do_it

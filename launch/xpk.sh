#!/usr/bin/env bash
# Launches a program on TPU slices of a GKE cluster that XPK made (https://github.com/AI-Hypercomputer/xpk).
#
#   ./launch/xpk.sh --project=my-project --zone=us-east5-a --cluster=pods --name=clip --type=v6e-256 \
#       --image=us-east5-docker.pkg.dev/my-project/unclip/unclip_jax:4f2a \
#       train --config=configs/clip.py:paper --workdir=gs://my-bucket/runs/clip --config.data.dataset=/bucket/data/mine
#
# XPK starts all pods again after exit code 42 and after crashes, --restarts times in all, and ends at other exit codes.
# Buckets are mounted by XPK: `xpk storage attach`. Run again, it joins a job that runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/command_line.sh
. launch/command_line.sh
# shellcheck source=launch/tpu_types.sh
. launch/tpu_types.sh
# shellcheck source=launch/jobsets.sh
. launch/jobsets.sh

define project "" "ID of the Google Cloud project"
define zone "" "where the cluster is, such as us-east5-a"
define cluster "" "that xpk cluster create made"
define_cluster_options
define priority medium "very-low, low, medium, high or very-high"
read_options "$@"
check_project
check_zone
need_options cluster
check_name "${option[cluster]}" --cluster 40
check_cluster_options 18  # -slice-job-N-N-abcde, without the numbers
[[ "${option[priority]}" =~ ^(very-low|low|medium|high|very-high)$ ]] \
  || fail "--priority is '${option[priority]}'; it is one of very-low, low, medium, high and very-high"
need_tools xpk gcloud kubectl

where=("--project=${option[project]}" "--zone=${option[zone]}" "--cluster=${option[cluster]}")
kubectl=(kubectl --namespace=default)
jobset=${option[name]}
set_question

# XPK's clusters are of a region; with its credentials kubectl can be asked.
get_credentials() {
  run gcloud container clusters get-credentials "${option[cluster]}" "--project=${option[project]}" \
    "--location=${option[zone]%-*}"
}

# XPK wraps the command in a shell that passes SIGTERM on; `exec` leaves nothing between that shell and Python.
launch() {
  local create state
  create=(xpk workload create "${where[@]}" "--workload=$jobset" "--tpu-type=$tpu_accelerator_type"
    "--num-slices=${option[slices]}" "--docker-image=${option[image]}" "--max-restarts=${option[restarts]}"
    "--termination-grace-period-seconds=${option[grace]}" "--priority=${option[priority]}"
    "--env=JAX_COORDINATOR_ADDRESS=$jobset-slice-job-0-0.$jobset:8482" "--env=UNCLIP_JOIN_SECONDS=$JOIN_SECONDS"
    "--command=exec python -m unclip_jax.$(quote_all "${words[@]}")")
  [ -z "${option[retry-errors]}" ] || create+=("--restart-on-exit-codes=$EXIT_FAILED")
  get_credentials
  if [ -n "${option[dry-run]}" ]; then
    note "unless it is there already; deleted first where it failed:"
    show "${create[@]}"
    show_the_end
    return
  fi
  state=$(jobset_state)
  [ "$state" != unknown ] || fail "kubectl could not be asked about $jobset: see above"
  case $state in
    Completed) say "$jobset is done already"; exit "$EXIT_DONE" ;;
    running) say "$jobset is there already" ;;
    Failed)
      say "$jobset failed before; it is started anew and goes on from its last save"
      xpk workload delete "${where[@]}" "--workload=$jobset" --force
      "${create[@]}"
      ;;
    absent) "${create[@]}" ;;
  esac
  see_it_end
}

case ${option[do]} in
  run) launch ;;
  status) get_credentials && show_status ;;
  logs) get_credentials && show_logs ;;
  delete) run xpk workload delete "${where[@]}" "--workload=$jobset" --force ;;
esac

#!/usr/bin/env bash
# Launches a program on TPU slices of a GKE cluster, as a JobSet (https://jobset.sigs.k8s.io, 0.10.1 or later).
#
#   ./launch/jobset.sh --name=clip --type=v6e-256 --image=us-east5-docker.pkg.dev/my-project/unclip/unclip_jax:4f2a \
#       --bucket=gs://my-bucket --service-account=trainer --spot \
#       train --config=configs/clip.py:paper --workdir=gs://my-bucket/runs/clip --config.data.dataset=/bucket/data/mine
#
# --dry-run prints the manifest inside the command that would apply it. Where a pod stops after saving (exit code 42) or
# its node is taken away, all pods start again, and that is not counted; other crashes are, up to --restarts; exit code 1
# ends the job. Run again, it joins a job that runs, and starts one that failed anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/command_line.sh
. launch/command_line.sh
# shellcheck source=launch/tpu_types.sh
. launch/tpu_types.sh
# shellcheck source=launch/jobsets.sh
. launch/jobsets.sh

define_cluster_options
define context "" "kubectl's context (by default the current one)"
define namespace default "the job's namespace"
define queue "" "LocalQueue of Kueue that the job waits in"
define bucket "" "gs://NAME, readable at /bucket in every pod (needs GKE's add-on GcsFuseCsiDriver)"
define service-account "" "Kubernetes service account that the pods act as"
define_flag spot "on spot nodes, which are taken away at any moment"
define_flag host-network "on the nodes' own network: faster between slices; programs then act as the nodes' account"
read_options "$@"
check_cluster_options 14  # -slice-N-N-abcde, without the numbers
check_bucket
check_name "${option[namespace]}" --namespace 63
[ -z "${option[queue]}" ] || check_name "${option[queue]}" --queue 63
[ -z "${option[service-account]}" ] || check_name "${option[service-account]}" --service-account 63
need_tools kubectl

kubectl=(kubectl)
[ -z "${option[context]}" ] || kubectl+=("--context=${option[context]}")
kubectl+=("--namespace=${option[namespace]}")
jobset=${option[name]}
set_question

# A word as YAML reads it, whatever is in it.
yaml() {
  local text=${1//\\/\\\\}
  [[ "$text" != *[$'\001'-$'\037']* ]] || fail "an option of the program has a line break or a control character in it"
  printf '"%s"' "${text//\"/\\\"}"
}

manifest() {
  local word
  cat << END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $jobset
  namespace: ${option[namespace]}
  labels:
    app.kubernetes.io/name: unclip-jax
END
  if [ -n "${option[queue]}" ]; then echo "    kueue.x-k8s.io/queue-name: ${option[queue]}"; fi
  cat << END
  annotations:
    # Each slice is one node pool, and a job has it to itself.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
    unclip-jax/job: "$job"
spec:
  network:
    enableDNSHostnames: true
    publishNotReadyAddresses: true  # pods meet before they are ready
  failurePolicy:
    maxRestarts: ${option[restarts]}
    # In this order: what stopped after saving or lost its node goes on, whatever that did to its peers.
    rules:
      - name: stopped_or_preempted
        action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
        onJobFailureMessagePatterns: ["exit code $EXIT_REQUEUE ", "condition DisruptionTarget "]
END
  if [ -z "${option[retry-errors]}" ]; then
    cat << END
      - name: failed
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
END
  fi
  cat << END
  replicatedJobs:
    - name: slice
      replicas: ${option[slices]}
      template:
        spec:
          parallelism: $tpu_hosts
          completions: $tpu_hosts
          completionMode: Indexed
          backoffLimit: 0  # a pod alone is of no use: all start again, or none
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: program, operator: In, values: [$EXIT_REQUEUE]}
              - action: FailJob
                onPodConditions: [{type: DisruptionTarget, status: "True"}]
END
  if [ -z "${option[retry-errors]}" ]; then
    cat << END
              - action: FailJob
                onExitCodes: {containerName: program, operator: In, values: [$EXIT_FAILED]}
END
  fi
  echo "          template:"
  if [ -n "${option[bucket]}" ]; then
    cat << END
            metadata:
              annotations:
                gke-gcsfuse/volumes: "true"
END
  fi
  cat << END
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: ${option[grace]}
END
  if [ -n "${option[service-account]}" ]; then echo "              serviceAccountName: ${option[service-account]}"; fi
  if [ -n "${option[host-network]}" ]; then
    echo "              hostNetwork: true"
    echo "              dnsPolicy: ClusterFirstWithHostNet"
  fi
  cat << END
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $tpu_gke
                cloud.google.com/gke-tpu-topology: $tpu_topology
END
  if [ -n "${option[spot]}" ]; then echo '                cloud.google.com/gke-spot: "true"'; fi
  cat << END
              tolerations:
                - {key: google.com/tpu, operator: Exists, effect: NoSchedule}
END
  if [ -n "${option[spot]}" ]; then
    echo '                - {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}'
  fi
  cat << END
              containers:
                - name: program
                  image: ${option[image]}
                  # No shell: Python is process 1 and gets SIGTERM.
                  command: [python, -m, unclip_jax.${words[0]}]
END
  if [ "${#words[@]}" -gt 1 ]; then
    echo "                  args:"
    for word in "${words[@]:1}"; do echo "                    - $(yaml "$word")"; done
  fi
  cat << END
                  env:
                    # GKE tells each pod which host of which slice it is, and JAX reads that; this is where all meet.
                    - {name: JAX_COORDINATOR_ADDRESS, value: "$jobset-slice-0-0.$jobset:8482"}
                    - {name: UNCLIP_JOIN_SECONDS, value: "$JOIN_SECONDS"}
                  securityContext:
                    privileged: true  # the chips' devices, and memory that is pinned for them, are root's
                    runAsUser: 0
                  resources:
                    limits:
                      google.com/tpu: $tpu_chips_per_host
END
  if [ -n "${option[bucket]}" ]; then
    cat << END
                  volumeMounts:
                    - {name: bucket, mountPath: /bucket, readOnly: true}
              volumes:
                - name: bucket
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    readOnly: true
                    volumeAttributes:
                      bucketName: ${option[bucket]#gs://}
                      mountOptions: implicit-dirs
END
    if [ -n "${option[host-network]}" ]; then echo '                      hostNetworkPodKSA: "true"'; fi
  fi
}

launch() {
  local state text ours
  job=$({ quote_all "${option[image]}" "${option[type]}" "${option[slices]}" "${words[@]}"; } | cksum | cut -d' ' -f1)
  text=$(manifest)
  if [ -n "${option[dry-run]}" ]; then
    note "unless it is there already; deleted first where it failed:"
    printf "%s << 'END'\n%s\nEND\n" "$(show "${kubectl[@]}" apply -f -)" "$text"
    show_the_end
    return
  fi
  state=$(jobset_state)
  [ "$state" != unknown ] || fail "kubectl could not be asked about $jobset: see above"
  if [ "$state" != absent ]; then
    ours=$("${kubectl[@]}" get jobset "$jobset" '--output=jsonpath={.metadata.annotations.unclip-jax/job}')
    [ "$ours" = "$job" ] \
      || fail "there is another job of the name $jobset; delete it by --do=delete, or take another --name"
  fi
  case $state in
    Completed) say "$jobset is done already"; exit "$EXIT_DONE" ;;
    running) say "$jobset is there already" ;;
    Failed)
      say "$jobset failed before; it is started anew and goes on from its last save"
      "${kubectl[@]}" delete jobset "$jobset"
      "${kubectl[@]}" apply -f - <<< "$text"
      ;;
    absent) "${kubectl[@]}" apply -f - <<< "$text" ;;
  esac
  see_it_end
}

case ${option[do]} in
  run) launch ;;
  status) show_status ;;
  logs) show_logs ;;
  delete) run "${kubectl[@]}" delete jobset "$jobset" ;;
esac

# shellcheck shell=bash
# A job as a JobSet on GKE: whether it is there, how it ended, its output. Sourced by jobset.sh and xpk.sh, after
# command_line.sh. They set `kubectl`, the command with its context and namespace, and `jobset`, the JobSet's name.
# shellcheck disable=SC2154  # what those set

define_cluster_options() {
  define name "" "of the job; the same name goes on with it"
  define type "" "of a slice: v4-N, v5e-N, v5p-N, v6e-N or tpu7x-N"
  define slices 1 "how many slices the job runs on"
  define image "" "the image with its tag, as launch/image.sh prints it"
  define restarts 20 "how often the job may crash and be started again"
  define grace 120 "seconds that a program has to save after SIGTERM (a spot node gives 15 at most)"
  define_flag retry-errors "start again after exit code 1 as well, as after a crash: once a run has shown that it can"
  define_flag wait "stay until the job ends, and end as it does"
  define poll 60 "seconds between two looks"
  define "do" run "run, status, logs or delete"
}

check_cluster_options() {
  need_options name
  check_number slices
  check_number restarts
  check_number grace
  check_number poll
  [[ "${option[do]}" =~ ^(run|status|logs|delete)$ ]] \
    || fail "--do is '${option[do]}'; it is one of run, status, logs and delete"
  if [ "${option[do]}" = run ]; then
    need_options type image
    read_tpu_type "${option[type]}"
    # Kubernetes puts the numbers of slice and host and five characters behind the name, and allows 63 in all.
    check_name "${option[name]}" --name $((63 - ${#tpu_hosts} - ${#option[slices]} - $1))
    [[ "${option[image]}" =~ ^[a-zA-Z0-9._:/-]+[:@][a-zA-Z0-9._:-]+$ ]] \
      || fail "--image is '${option[image]}'; it needs its tag, as launch/image.sh prints it: REGISTRY/NAME:TAG"
    check_program
    check_lasting
  else
    [ "${#words[@]}" = 0 ] || fail "--do=${option[do]} takes no program"
  fi
}

# What kubectl is asked for the state, once `kubectl` and `jobset` are set.
set_question() {
  ask_state=("${kubectl[@]}" get jobset "$jobset" --ignore-not-found
    '--output=jsonpath={.metadata.name} {.status.terminalState}')
}

# Prints absent, running, Completed or Failed; unknown where kubectl has no answer.
jobset_state() {
  local found
  found=$("${ask_state[@]}") || { echo unknown; return; }
  case $found in
    '') echo absent ;;
    *' Completed') echo Completed ;;
    *' Failed') echo Failed ;;
    *) echo running ;;
  esac
}

# Waits for the end where --wait is given, and ends this launcher.
see_it_end() {
  local state unknown=0
  [ -n "${option[wait]}" ] || exit "$EXIT_DONE"
  while :; do
    state=$(jobset_state)
    if [ "$state" = unknown ]; then unknown=$((unknown + 1)); else unknown=0; fi
    [ $unknown -lt 10 ] || fail "kubectl could not be asked about $jobset 10 times in a row; the job may go on"
    case $state in
      Completed) say "$jobset is done"; exit "$EXIT_DONE" ;;
      Failed) say "error: $jobset failed; ${0##*/} --do=logs shows why"; exit "$EXIT_FAILED" ;;
      absent) say "error: $jobset was deleted before it ended"; exit "$EXIT_FAILED" ;;
    esac
    nap "${option[poll]}"
  done
}

show_the_end() {
  [ -n "${option[wait]}" ] || return 0
  note "every ${option[poll]} s until it is Completed or Failed:"
  show "${ask_state[@]}"
}

show_status() {
  run "${kubectl[@]}" get jobset "$jobset"
  run "${kubectl[@]}" get pods "--selector=jobset.sigs.k8s.io/jobset-name=$jobset" --output=wide
}

show_logs() {
  run "${kubectl[@]}" logs --prefix --tail=40 --max-log-requests=64 \
    "--selector=jobset.sigs.k8s.io/jobset-name=$jobset,batch.kubernetes.io/job-completion-index=0"
}

# shellcheck shell=bash
# A job on the hosts of a TPU that Cloud TPU makes: made, installed, started, watched, started again, deleted.
# Sourced by tpu_vm.sh and queued_resource.sh, after command_line.sh and tpu_types.sh. They say what differs:
#   tpu=(gcloud compute tpus tpu-vm)   which kind of thing it is
#   hosts=(--worker=all)               all its hosts
#   created=(--option…)                what it is created with
#   deleted=(--option…)                and deleted with
#   ask_state=(gcloud …)               prints its state, which known_state translates
#   ask_slices=(gcloud …)              prints the states of its slices, where that is another question
# shellcheck disable=SC2154  # what those files and scripts set

define_tpu_options() {
  define project "" "ID of the Google Cloud project"
  define zone "" "where the TPU is, such as us-east5-a"
  define name "" "of the TPU, and of this job; the same name goes on with it"
  define type "" "of the slice: v4-N, v5e-N, v5p-N or v6e-N"
  define runtime "" "software of the TPU VM (by default the one for JAX on this type)"
  define bucket "" "gs://NAME, checked to lie in the zone's region, and readable at /bucket on every host"
  define_flag any-region "take the bucket from wherever it is, and pay for the traffic"
  define ref HEAD "which commit of this checkout is launched"
  define network "" "VPC network (by default 'default')"
  define subnetwork "" "its subnetwork"
  define service-account "" "account that the hosts act as (by default Compute Engine's)"
  define_flag internal-ips "no external addresses; the network needs Cloud NAT to install anything"
  define_flag keep "leave the TPU, and its price, when the job ends"
  define restarts 100 "how often the job may be started again"
  define_flag retry-errors "start again after exit code 1 as well, as after a crash: once a run has shown that it can"
  define poll 60 "seconds between two looks"
  define "do" run "run, status, logs, stop (the job saves; end its launcher first, or that starts it again) or delete"
}

check_tpu_options() {
  check_project
  check_zone
  need_options name
  check_name "${option[name]}" --name 40
  check_number restarts
  check_number poll
  [[ "${option[do]}" =~ ^(run|status|logs|stop|delete)$ ]] \
    || fail "--do is '${option[do]}'; it is one of run, status, logs, stop and delete"
  if [ "${option[do]}" = run ]; then
    need_options type
    read_tpu_type "${option[type]}"
    [ -n "$tpu_runtime" ] || fail "Cloud TPU has no $tpu_family VMs, only GKE has: launch/jobset.sh or launch/xpk.sh"
    check_bucket
    check_program
    check_lasting
    commit=$(git rev-parse --verify --quiet --short=12 "${option[ref]}^{commit}") \
      || fail "--ref=${option[ref]} is no commit of this checkout, which is launched as git has it"
    [ "${option[ref]}" != HEAD ] || git diff --quiet HEAD -- || say "note: changes that are not committed are not launched"
    job=$(quote_all "${words[@]}" | cksum | cut -d' ' -f1)  # tells this job from another on the same machines
  else
    [ "${#words[@]}" = 0 ] || fail "--do=${option[do]} takes no program"
  fi
  where=("--project=${option[project]}" "--zone=${option[zone]}" --quiet)  # nobody is there to answer questions
}

# What tpu-vm create and queued-resources create have in common.
network_options() {
  local name
  for name in network subnetwork service-account; do
    [ -z "${option[$name]}" ] || created+=("--$name=${option[$name]}")
  done
  [ -z "${option[internal-ips]}" ] || created+=(--internal-ips)
}

on_hosts() { run "${tpu[@]}" ssh "${option[name]}" "${where[@]}" "${hosts[@]}" "--command=$1"; }

# --- the job ---------------------------------------------------------------------------------------------------------

prepare_hosts() {
  local archive=unclip_jax-$commit.tar.gz folder=$HOME/.cache/unclip_jax/${option[name]}
  run mkdir -p "$folder" \
    && run git archive --format=tar.gz "--output=$folder/$archive" "$commit" \
    && run "${tpu[@]}" scp "$folder/$archive" "${option[name]}:$archive" "${where[@]}" "${hosts[@]}" \
    && run rm "$folder/$archive" \
    && on_hosts "mkdir -p unclip_jax-$commit && tar -xzf $archive -C unclip_jax-$commit && bash \
unclip_jax-$commit/launch/host.sh install${option[bucket]:+ --bucket=${option[bucket]}}"
}

start_job() { on_hosts "bash unclip_jax-$commit/launch/host.sh start $job $(quote_all "${words[@]}")"; }

# What systemd knows of the service, in one line for each host that nothing else prints.
LOOK="echo unclip_jax \$(hostname) \$(systemctl show unclip_jax \
--property=Description,LoadState,ActiveState,SubState,ExecMainCode,ExecMainStatus)"
LAST_LINES="if [ \"\$(systemctl show unclip_jax --property=ExecMainStatus --value)\" = 1 ]; then \
tail -n 40 unclip_jax.log; fi"

# Counts hosts by what the job is there: running, finished, failed (exit code 1), stopped (42), crashed, none (not
# started, or the host was started anew); foreign is another job that runs. False where a host could not be asked.
look() {
  local lines line word kind active sub code status description
  running=0 finished=0 failed=0 stopped=0 crashed=0 none=0 foreign=0
  lines=$(on_hosts "$LOOK" 2>&1) || { trouble=${lines##*$'\n'}; return 1; }
  while read -r line; do
    [[ "$line" == *"unclip_jax "*LoadState=* ]] || continue
    active='' sub='' code=0 status=0 description=''
    for word in $line; do
      case $word in
        Description=*) description=${word#*=} ;;
        ActiveState=*) active=${word#*=} ;;
        SubState=*) sub=${word#*=} ;;
        ExecMainCode=*) code=${word#*=} ;;  # 1 exited, 2 and 3 killed by a signal
        ExecMainStatus=*) status=${word#*=} ;;
      esac
    done
    if [[ "$line" == *LoadState=not-found* ]]; then kind=none
    elif [[ "$active-$sub" == active-running || "$active" == *ating ]]; then kind=running
    elif [ "$description" != "$job" ]; then kind=none
    elif [ "$code" = 1 ] && [ "$status" = "$EXIT_DONE" ]; then kind=finished
    elif [ "$code" = 1 ] && [ "$status" = "$EXIT_FAILED" ]; then kind=failed
    elif [ "$code" = 1 ] && [ "$status" = "$EXIT_REQUEUE" ]; then kind=stopped
    else kind=crashed; fi
    [ $kind != running ] || [ "$description" = "$job" ] || foreign=$((foreign + 1))
    declare -g "$kind=$((${!kind} + 1))"
  done <<< "$lines"
  [ $((running + finished + failed + stopped + crashed + none)) -gt 0 ]
}

tell() { say "$(date '+%H:%M:%S') ${option[name]}: $*"; }
counts() {
  printf '%s' "hosts: $running running, $finished done, $failed failed, $stopped stopped, $crashed crashed, $none idle"
}

# Watches until the job runs nowhere. Hosts wait for each other: one that ended while others go on is given a few looks,
# then the others are asked to stop. False where the machines went away meanwhile.
watch_job() {
  local unreachable=0 alone=0
  while :; do
    if look; then
      unreachable=0
      if [ "$running" = 0 ]; then break; fi
      if [ $((finished + failed + stopped + crashed + none)) -gt 0 ]; then alone=$((alone + 1)); else alone=0; fi
      if [ "$alone" = 5 ]; then
        tell "$(counts); stopping the rest"
        on_hosts 'sudo systemctl stop unclip_jax' || true
      fi
    else
      [ "$(state_of)" = ready ] || return 1
      unreachable=$((unreachable + 1))
      [ "$unreachable" -lt 10 ] \
        || fail "the hosts of ${option[name]} are there and could not be reached 10 times in a row; the job may go on;" \
          "the last answer was: $trouble"
    fi
    nap "${option[poll]}"
  done
  [ "$(state_of)" = ready ]  # exit codes from machines that are being taken away say nothing
}

# --- from nothing to done --------------------------------------------------------------------------------------------

# Prints absent, waiting, ready, leaving, lost (to be made again), unknown, or else Cloud TPU's own word.
state_of() {
  local state
  if ! state=$("${ask_state[@]}" 2>&1); then
    if [[ "$state" == *NOT_FOUND* ]]; then echo absent; else echo unknown; fi
    return
  fi
  known_state "${state##*$'\n'}"
}

create() { run "${tpu[@]}" create "${option[name]}" "${where[@]}" "${created[@]}"; }
delete() { run "${tpu[@]}" delete "${option[name]}" "${where[@]}" "${deleted[@]}"; }

finish() {
  if [ -n "${option[keep]}" ]; then
    tell "kept, and billed; delete it by --do=delete"
  else
    delete || say "warning: ${option[name]} could not be deleted and is billed; see to it: ${0##*/} --do=delete"
  fi
  exit "$1"
}

# again WHY: counts a start that is to be repeated, and waits; longer where several in a row came to nothing.
again() {
  starts=$((starts + 1))
  if [ "$starts" -gt "${option[restarts]}" ]; then
    say "error: $1, and --restarts=${option[restarts]} are used up"
    finish "$EXIT_REQUEUE"
  fi
  if [ $((SECONDS - began)) -ge 600 ]; then fruitless=0; else fruitless=$((fruitless + 1)); fi
  tell "$1; start $starts of ${option[restarts]} follows in $(pause_seconds $fruitless) s"
  nap "$(pause_seconds $fruitless)"
}

# Asks for the TPU; a refusal ends this, unless it was granted before. One that was there and is not was deleted by
# somebody, who will have had a reason.
make_tpu() {
  [ -z "$there" ] || fail "${option[name]} was deleted by somebody else; the same command makes it again"
  began=$SECONDS prepared=''
  tell "asking for $tpu_accelerator_type"
  if create; then return; fi
  [ "$starts" != 0 ] || fail "${option[name]} could not be created"
  again "it could not be created"
}

# Sees to the job on machines that are ready. Comes back where it is to be started again, or the machines went away.
run_job() {
  local crashes=0
  while :; do
    began=$SECONDS
    # New machines take a while to answer. Those that never do are idle, or cannot be prepared either.
    look || { nap 30 && look; } || { nap 60 && look; } \
      || none=1 running=0 finished=0 failed=0 stopped=0 crashed=0 foreign=0
    [ "$foreign" = 0 ] || fail "${option[name]} is busy with another job; stop that by --do=stop, or take another --name"
    if [ "$none" != 0 ]; then prepared=''; fi  # new, or started anew: nothing is installed, or nothing mounted
    if [ "$running" = 0 ] && { [ "$finished" = 0 ] || [ "$failed$stopped$crashed$none" != 0000 ]; }; then
      if [ -z "$prepared" ]; then
        tell "installing commit $commit"
        prepare_hosts || { tell "the hosts could not be prepared"; return 0; }
        prepared=1
      fi
      start_job || { tell "the job could not be started"; return 0; }
      tell "started: $(quote_all "${words[@]}")"
    fi
    watch_job || return 0
    if [ "$failed$stopped$crashed$none" = 0000 ]; then tell "done"; finish "$EXIT_DONE"; fi
    # Where other hosts crashed, an error of this one may be theirs: a peer that is lost.
    if [ "$failed" != 0 ] && [ "$stopped$crashed$none" = 000 ] && [ -z "${option[retry-errors]}" ]; then
      on_hosts "$LAST_LINES" || true
      say "error: ${words[0]} failed on $failed hosts of ${option[name]}; its last lines are above"
      finish "$EXIT_FAILED"
    fi
    if [ $((failed + crashed)) = 0 ] || [ $((SECONDS - began)) -ge 600 ]; then crashes=0; fi
    if [ $((failed + crashed)) != 0 ]; then crashes=$((crashes + 1)); fi
    if [ $crashes = 5 ]; then
      say "error: ${words[0]} failed or crashed 5 times in a row on machines that were well"
      finish "$EXIT_FAILED"
    fi
    again "$(counts)"
  done
}

leave_it() {
  say "left as it is: the same command goes on, --do=stop stops the job, --do=delete deletes the TPU"
  exit "$EXIT_REQUEUE"
}

run_everything() {
  prepared='' starts=0 fruitless=0 began=$SECONDS unknown=0 there=''
  if [ -n "${option[dry-run]}" ]; then show_everything; return; fi
  check_region
  trap leave_it INT TERM
  while :; do
    state=$(state_of)
    if [ "$state" = unknown ]; then unknown=$((unknown + 1)); else unknown=0; fi
    case $state in
      absent) make_tpu ;;
      unknown)
        [ $unknown -lt 10 ] || fail "Cloud TPU could not be asked about ${option[name]} 10 times in a row"
        nap "${option[poll]}"
        ;;
      leaving) nap "${option[poll]}" ;;
      waiting) there=1; nap "${option[poll]}" ;;
      ready) there=1; run_job; if [ "$(state_of)" = ready ]; then again "the hosts could not be set up"; fi ;;
      lost) there=''; delete || true; again "the TPU is gone" ;;
      *) fail "${option[name]} is $state; start it (gcloud compute tpus tpu-vm start) or delete it (--do=delete)" ;;
    esac
  done
}

show_everything() {
  check_region
  note "unless it is there already:"
  create
  note "every ${option[poll]} s until it is ready; deleted and asked for again where it was taken away:"
  show "${ask_state[@]}"
  [ "${#ask_slices[@]}" = 0 ] || show "${ask_slices[@]}"
  prepare_hosts
  start_job
  note "every ${option[poll]} s until it ended on all hosts; started again after exit code $EXIT_REQUEUE or a lost TPU:"
  on_hosts "$LOOK"
  note "at the end, unless --keep:"
  if [ -z "${option[keep]}" ]; then delete; fi
}

do_it() {
  case ${option[do]} in
    run) run_everything ;;
    status)
      run "${ask_state[@]}"
      on_hosts "$LOOK"
      ;;
    logs) on_hosts 'tail -n 40 unclip_jax.log' ;;
    stop) on_hosts 'sudo systemctl stop unclip_jax' ;;
    delete) delete ;;
  esac
}

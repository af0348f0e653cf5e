#!/usr/bin/env bash
# Trains all stages through one of the launchers: CLIP first; the priors and the decoder, which read the frozen CLIP, when
# it is done; the upsamplers, which do not, at once. What can, runs side by side.
#
#   ./launch/stages.sh --launcher=queued_resource --name=paper --variant=paper --runs=gs://my-bucket/runs/paper \
#       --project=my-project --zone=us-east5-a --bucket=gs://my-bucket --type=v5p-512 --spot \
#       --upsampler-2='--type=v5p-256 --config.data.dataset=/bucket/data/large' \
#       train --config.data.dataset=/bucket/data/mine
#
# Options that are not listed below go to the launcher; those after `train` to every stage. Each stage's run is named
# NAME-STAGE, and its folder is RUNS/STAGE. A stage that fails is named and stops those that need it; the others go on.
# Run again, it skips the stages that are done and joins or repeats the rest; it may be ended at any time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/command_line.sh
. launch/command_line.sh

ALL="clip prior_diffusion prior_ar decoder upsampler_1 upsampler_2"

define launcher "" "tpu_vm, queued_resource, jobset, xpk or slurm"
define name "" "of the whole, in front of every stage's name"
define variant "" "of the configs: paper, small, tiny or emoji"
define runs "" "folder above the stages' workdirs"
define stages "${ALL// /,}" "which of the stages"
define side-by-side 6 "how many at a time, where quota does not allow all"
define records runs/stages "folder on this machine for what is done, and for the launchers' output"
for stage in $ALL; do
  define "${stage//_/-}" "" "options for this stage alone: --config.… for the program, others for its launcher"
done

# Options that this script does not have are kept for the launcher.
own=() passed=()
while [ $# -gt 0 ] && [[ "$1" == -* ]]; do
  name=${1%%=*}
  name=${name#--}
  if [ -n "${described[$name]:-}" ] || [[ "$name" =~ ^(dry-run|help|-h)$ ]]; then own+=("$1"); else passed+=("$1"); fi
  shift
done
read_options "${own[@]}" "$@"

need_options launcher name variant runs
[[ "${option[launcher]}" =~ ^(tpu_vm|queued_resource|jobset|xpk|slurm)$ ]] \
  || fail "--launcher is '${option[launcher]}'; it is one of tpu_vm, queued_resource, jobset, xpk and slurm"
check_name "${option[name]}" --name 24
check_number side-by-side
[[ "${option[variant]}" =~ ^[a-z][a-z0-9_]*$ ]] || fail "--variant is '${option[variant]}'; one is 'paper'"
[ "${words[0]:-}" = train ] || fail "say what to launch after the options: train, and options for every stage"
IFS=, read -r -a stages <<< "${option[stages]}"
for stage in "${stages[@]}"; do
  [[ " $ALL " == *" $stage "* ]] || fail "there is no stage '$stage' to train; stages are ${ALL// /, }"
done
records=${option[records]}/${option[name]}

# --- what each stage is ----------------------------------------------------------------------------------------------

chosen() { [[ " ${stages[*]} " == *" $1 "* ]]; }

# The stage that must be done before this one begins, if it is trained here; nothing for those that need none.
need_of() { case $1 in prior_* | decoder) if chosen clip; then echo clip; fi ;; esac; }

# Sets `command_line` to the launcher's call for a stage, and `program` to what that runs.
read_stage() {
  local stage=$1 file=$1 variant=${option[variant]} more=() word launching=() programming=()
  case $stage in upsampler_*) file=upsampler variant+=_${stage#upsampler_} ;; esac
  read -r -a more <<< "${option[${stage//_/-}]}"
  for word in "${more[@]}"; do
    if [[ "$word" == --config* ]]; then programming+=("$word"); else launching+=("$word"); fi
  done
  program=(train "--config=configs/$file.py:$variant" "--workdir=${option[runs]%/}/$stage" "${words[@]:1}")
  case $stage in prior_* | decoder) program+=("--config.frozen.clip=${option[runs]%/}/clip") ;; esac
  program+=("${programming[@]}")
  case ${option[launcher]} in jobset | xpk | slurm) launching+=(--wait) ;; esac
  command_line=("launch/${option[launcher]}.sh" "--name=${option[name]}-${stage//_/-}" "${passed[@]}" "${launching[@]}")
}

digest() { quote_all "${program[@]}" | cksum | cut -d' ' -f1; }
is_done() { [ "$(cat "$records/$1.done" 2> /dev/null)" = "$(digest)" ]; }

# --- all of them -----------------------------------------------------------------------------------------------------

# Each launcher says what it would do, and thereby whether it could.
show_stages() {
  local stage need
  for stage in "${stages[@]}"; do
    read_stage "$stage"
    need=$(need_of "$stage")
    note "=== $stage, ${need:+after }${need:-at once}"
    if is_done "$stage"; then note "it is done already"; continue; fi
    note "$(quote_all "${command_line[@]}" "${program[@]}")"
    bash "${command_line[@]}" --dry-run "${program[@]}" || fail "$stage cannot be launched, and nothing was begun"
  done
}

start_stage() {
  local stage=$1
  read_stage "$stage"
  say "$(date '+%F %T') $stage begins; its launcher's output goes to $records/$stage.log"
  bash "${command_line[@]}" "${program[@]}" >> "$records/$stage.log" 2>&1 &
  state[$stage]=running pid[$stage]=$!
}

end_stage() {
  local stage=$1 status=0
  wait "${pid[$stage]}" || status=$?
  unset "pid[$stage]"
  if [ "$status" = "$EXIT_DONE" ]; then
    read_stage "$stage"
    digest > "$records/$stage.done"
    state[$stage]=finished
    say "$(date '+%F %T') $stage is done"
  else
    state[$stage]=failed
    if [ "$worst" != "$EXIT_FAILED" ]; then worst=$EXIT_REQUEUE; fi
    if [ "$status" != "$EXIT_REQUEUE" ]; then worst=$EXIT_FAILED; fi
    say "$(date '+%F %T') $stage ended with exit code $status: $(tail -n 1 "$records/$stage.log")"
  fi
}

# Launchers end after the command that they are at, which may be gcloud making a TPU: half a minute, then without them.
stop_all() {
  local alive
  trap - INT TERM
  kill -TERM "${pid[@]}" 2> /dev/null || true
  for _ in {1..30}; do
    alive=
    for stage in "${!pid[@]}"; do kill -0 "${pid[$stage]}" 2> /dev/null && alive=1; done
    [ -n "$alive" ] || break
    nap 1
  done
  say "the launchers are ended and their jobs left as they are; the same command goes on with them"
  exit "$EXIT_REQUEUE"
}

run_stages() {
  local stage need running began
  declare -gA state=() pid=()
  worst=$EXIT_DONE
  show_stages > /dev/null  # everything is checked before anything begins
  mkdir -p "$records"
  for stage in "${stages[@]}"; do
    read_stage "$stage"
    state[$stage]=waiting
    if is_done "$stage"; then state[$stage]=finished; say "$stage is done already"; fi
  done
  trap stop_all INT TERM
  while :; do
    running=0 began=
    for stage in "${stages[@]}"; do
      if [ "${state[$stage]}" = running ] && ! kill -0 "${pid[$stage]}" 2> /dev/null; then end_stage "$stage"; fi
      [ "${state[$stage]}" != running ] || running=$((running + 1))
    done
    for stage in "${stages[@]}"; do
      need=$(need_of "$stage")
      if [ "${state[$stage]}" = waiting ] && [ $running -lt "${option[side-by-side]}" ] \
        && { [ -z "$need" ] || [ "${state[$need]}" = finished ]; }; then
        start_stage "$stage"
        running=$((running + 1)) began=1
      fi
    done
    [ $running -gt 0 ] || break
    [ -n "$began" ] || nap 1
  done
  for stage in "${stages[@]}"; do
    [ "${state[$stage]}" != waiting ] || say "$stage was not begun, for it needs $(need_of "$stage")"
  done
  exit "$worst"
}

if [ -n "${option[dry-run]}" ]; then show_stages; else run_stages; fi

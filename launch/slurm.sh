#!/usr/bin/env bash
# Launches a program on GPU nodes of a SLURM cluster: one process a node, which has all the GPUs asked for there.
#
#   ./launch/slurm.sh --name=clip --nodes=4 --gpus=8 --time=24:00:00 --partition=gpu \
#       train --config=configs/clip.py:paper --workdir=/shared/runs/clip --config.data.dataset=/shared/data/mine
#
# Two minutes before the time limit, and where the job is preempted, the program gets SIGTERM, saves and ends with exit
# code 42; the job then queues itself again, as it does after a crash or a lost node, and ends at exit code 1. This
# checkout, its Python and the workdir must be on a file system that all nodes share. Run again, it joins a job that is
# queued or runs. What sbatch reads from the environment (SBATCH_…) holds here too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/command_line.sh
. launch/command_line.sh

define name "" "of the job; the same name goes on with it"
define nodes 1 "how many nodes"
define gpus 8 "GPUs of each node"
define cpus 0 "CPU cores of each node, most of them for reading data (0: eight for each GPU)"
define memory 0 "of each node, as sbatch has it, such as 500G (0: all of it)"
define time "" "limit of one run, such as 24:00:00 (by default the partition's)"
define partition "" "which partition"
define account "" "which account is charged"
define qos "" "which quality of service"
define python .venv/bin/python "where unclip_jax is installed, with the extra cuda12 or cuda13"
define container "" "image in place of that Python, for clusters with pyxis; launch/image.sh makes one"
define mounts "" "what the container sees, FROM:TO,FROM:TO; the workdir and the data must be among it"
define logs runs/slurm "folder of the output"
define notice 120 "seconds before the time limit at which the program is told to save"
define restarts 100 "how often the job may queue itself again"
define_flag retry-errors "start again after exit code 1 as well, as after a crash: once a run has shown that it can"
define_flag wait "stay until the job ends, and end as it does"
define poll 60 "seconds between two looks"
define "do" run "run, status, logs, stop (SIGTERM: it saves, and is queued again) or cancel"
read_options "$@"

need_options name
[[ "${option[name]}" =~ ^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$ ]] \
  || fail "--name is '${option[name]}'; it may have letters, digits, dots, dashes and underscores"
for number in nodes gpus notice restarts poll; do check_number $number; done
[[ "${option[cpus]}" =~ ^[0-9]{1,4}$ ]] || fail "--cpus is '${option[cpus]}'; it is a number of CPU cores"
[[ "${option[memory]}" =~ ^[0-9]+[KMGT]?$ ]] || fail "--memory is '${option[memory]}'; it is written like 500G"
[[ "${option[time]}" =~ ^(([0-9]+-)?[0-9]+(:[0-9]{2}){0,2})?$ ]] \
  || fail "--time is '${option[time]}'; it is written hours:minutes:seconds, or days-hours"
[[ "${option[do]}" =~ ^(run|status|logs|stop|cancel)$ ]] \
  || fail "--do is '${option[do]}'; it is one of run, status, logs, stop and cancel"
if [ "${option[do]}" = run ]; then
  check_program
  if [ -z "${option[container]}" ] && [ -z "${option[dry-run]}" ] && [ ! -x "${option[python]}" ]; then
    fail "there is no ${option[python]}; install unclip_jax on the shared file system, or give --python or --container"
  fi
else
  [ "${#words[@]}" = 0 ] || fail "--do=${option[do]} takes no program"
fi
need_tools sbatch squeue scontrol scancel

# The job of this name that is queued or runs; nothing where there is none.
job_number() {
  local numbers
  numbers=$(squeue --me --noheader "--name=${option[name]}" --format=%i) || return
  printf '%s\n' "${numbers%%$'\n'*}"
}

submit() {
  local number=${option[cpus]} name
  [ "$number" != 0 ] || number=$((8 * option[gpus]))
  command_line=(sbatch --parsable "--job-name=${option[name]}" "--nodes=${option[nodes]}" --ntasks-per-node=1
    "--gpus-per-node=${option[gpus]}" "--cpus-per-task=$number" "--mem=${option[memory]}"
    --requeue --open-mode=append "--signal=B:TERM@${option[notice]}" "--output=${option[logs]}/${option[name]}-%j.log")
  for name in time partition account qos; do
    [ -z "${option[$name]}" ] || command_line+=("--$name=${option[$name]}")
  done
  command_line+=(launch/slurm.sbatch)
  for name in restarts retry-errors gpus python container mounts; do command_line+=("${option[$name]}"); done
  command_line+=("${words[@]}")
}

see_it_end() {
  local shown state asked=0
  while :; do
    if shown=$(scontrol show job "$1" --oneliner 2>&1); then
      asked=0
      state=${shown#*JobState=}
      state=${state%%[ +]*}
      case $state in
        COMPLETED) say "job $1 is done"; exit "$EXIT_DONE" ;;
        PENDING | RUNNING | CONFIGURING | COMPLETING | STAGE_OUT | SIGNALING | STOPPED | SUSPENDED) ;;
        RESIZING | REQUEUED | REQUEUE_* | SPECIAL_EXIT | PREEMPTED) ;;
        *) fail "job $1 ended as $state; its output is in ${option[logs]}/${option[name]}-$1.log" ;;
      esac
    else
      asked=$((asked + 1))
      [ $asked -lt 10 ] || fail "SLURM could not be asked about job $1 10 times in a row: $shown"
    fi
    nap "${option[poll]}"
  done
}

launch() {
  local number
  submit
  if [ -n "${option[dry-run]}" ]; then
    note "unless a job of this name is queued or runs:"
    show mkdir -p "${option[logs]}"
    show "${command_line[@]}"
    [ -z "${option[wait]}" ] || { note "every ${option[poll]} s until it ended:"; show scontrol show job JOB --oneliner; }
    return
  fi
  number=$(job_number)
  if [ -n "$number" ]; then
    say "${option[name]} is there already, as job $number"
  else
    mkdir -p "${option[logs]}"
    number=$("${command_line[@]}")
    number=${number%%;*}
    say "${option[name]} is job $number; its output goes to ${option[logs]}/${option[name]}-$number.log"
  fi
  [ -z "${option[wait]}" ] || see_it_end "$number"
}

of_job() {
  local number
  if [ -n "${option[dry-run]}" ]; then show "$@" JOB; return; fi
  number=$(job_number)
  [ -n "$number" ] || fail "no job of the name ${option[name]} is queued or runs"
  "$@" "$number"
}

case ${option[do]} in
  run) launch ;;
  status) run squeue --me "--name=${option[name]}" ;;
  logs)
    newest=$(find "${option[logs]}" -name "${option[name]}-*.log" -printf '%T@ %p\n' 2> /dev/null | sort -n | tail -n 1)
    [ -n "$newest" ] || fail "there is no output of ${option[name]} in ${option[logs]}"
    run tail -n 40 "${newest#* }"
    ;;
  stop) of_job scancel --signal=TERM ;;
  cancel) of_job scancel ;;
esac

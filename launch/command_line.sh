# shellcheck shell=bash
# What the launchers share: their options, the checks before anything is done, and commands that --dry-run only prints.
# Sourced by them, from the repository's root.
# shellcheck disable=SC2034  # what is set here is for those that source this

EXIT_DONE=0 EXIT_FAILED=1 EXIT_REQUEUE=42  # exit codes of the programs, and of the launchers
JOIN_SECONDS=900  # that hosts wait for each other at the start: nodes come, and pull the image, one after the other

say() { printf '%s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit "$EXIT_FAILED"; }

[ "${BASH_VERSINFO[0]}" -ge 5 ] || [[ "$BASH_VERSION" == 4.[4-9]* ]] \
  || fail "bash 4.4 or later is needed, this is $BASH_VERSION (macOS: brew install bash)"

# --- options ---------------------------------------------------------------------------------------------------------

declare -A option=() described=() is_flag=()
option_names=()
words=()  # what follows the options: the program and its own options

# define NAME DEFAULT TEXT declares --NAME=VALUE, define_flag NAME TEXT declares --NAME. `option[NAME]` is its value.
define() { option_names+=("$1"); option[$1]=$2; described[$1]=$3; }
define_flag() { define "$1" "" "$2"; is_flag[$1]=1; }

# The script's leading comment, then its options.
show_help() {
  local name shown
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"
  printf '\nOptions:\n'
  for name in "${option_names[@]}"; do
    shown="--$name"
    [ -n "${is_flag[$name]:-}" ] || shown+="=${option[$name]:-VALUE}"
    printf '  %-34s %s\n' "$shown" "${described[$name]}"
  done
}

read_options() {
  local word name
  define_flag dry-run "print what would be done, and do nothing"
  define_flag help "print this"
  while [ $# -gt 0 ]; do
    word=$1
    case $word in
      --help | -h) show_help; exit "$EXIT_DONE" ;;
      --) shift; words=("$@"); return ;;
      --*) ;;
      *) words=("$@"); return ;;
    esac
    name=${word%%=*}
    name=${name#--}
    [ -n "${described[$name]:-}" ] \
      || fail "there is no option --$name; ${0##*/} --help lists them, and a program's own options come after its name"
    if [ -n "${is_flag[$name]:-}" ]; then
      [ "$word" = "--$name" ] || fail "--$name takes no value"
      option[$name]=1
    else
      [[ "$word" == *=* ]] || fail "--$name needs a value: --$name=VALUE"
      option[$name]=${word#*=}
    fi
    shift
  done
}

# --- checks ----------------------------------------------------------------------------------------------------------

need_options() {
  local name
  for name in "$@"; do
    [ -n "${option[$name]}" ] || fail "give --$name=VALUE: ${described[$name]}"
  done
}

need_tools() {
  local tool
  [ -z "${option[dry-run]}" ] || return 0
  for tool in "$@"; do
    command -v "$tool" > /dev/null || fail "$tool is not installed, or not on the PATH; --dry-run works without it"
  done
}

# check_name VALUE WHAT LONGEST: what Google Cloud and Kubernetes accept as a name.
check_name() {
  [[ "$1" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] \
    || fail "$2 is '$1'; it may have small letters, digits and dashes, a letter first and no dash last"
  [ "${#1}" -le "$3" ] || fail "$2 '$1' has ${#1} characters, and at most $3 are possible"
}

check_number() {
  [[ "${option[$1]}" =~ ^[1-9][0-9]{0,5}$ ]] || fail "--$1 is '${option[$1]}'; it is a whole number from 1 on"
}

check_project() {
  need_options project
  [[ "${option[project]}" =~ ^([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]$ ]] \
    || fail "--project is '${option[project]}', which is no project ID (not its name: gcloud projects list has IDs)"
}

check_zone() {
  need_options zone
  [[ "${option[zone]}" =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] \
    || fail "--zone is '${option[zone]}'; a zone is written like us-east5-a"
}

check_bucket() {
  [ -z "${option[bucket]}" ] || [[ "${option[bucket]}" =~ ^gs://[a-z0-9][-a-z0-9_.]{1,61}[a-z0-9]$ ]] \
    || fail "--bucket is '${option[bucket]}'; a bucket is written gs://NAME, without a folder"
}

# check_program: `words` are a program and options that it can be launched with.
check_program() {
  [ "${#words[@]}" -gt 0 ] || fail "say what to launch after the options, such as: train --config=… --workdir=…"
  local program=${words[0]#unclip_jax.} word file
  [[ "$program" =~ ^[a-z][a-z0-9_]*$ ]] || fail "'${words[0]}' is no name of a program; one is 'train'"
  if [ ! -f "unclip_jax/$program.py" ]; then
    [ -n "${option[dry-run]}" ] || fail "there is no program unclip_jax/$program.py in this checkout"
    say "note: there is no program unclip_jax/$program.py in this checkout; without --dry-run this ends here"
  fi
  words[0]=$program
  for word in "${words[@]:1}"; do
    [[ "$word" == --* ]] || fail "'$word' is no option of $program; options are written --name=value"
    if [[ "$word" == --config=* ]]; then
      file=${word#--config=}
      file=${file%%:*}
      [ -f "$file" ] || fail "the config $file is not in this checkout"
    fi
  done
}

# check_lasting: everything the program writes outlives the machine that writes it.
check_lasting() {
  local word
  for word in "${words[@]:1}"; do
    if [[ "$word" =~ ^--(workdir|out)= ]] && [[ "$word" != *=gs://?* ]]; then
      fail "$word is on the machine's own disk, which goes when the machine goes, and no other host sees it; give gs://…"
    fi
  done
}

# check_region: the buckets, --bucket and those that the program's options name, lie where the accelerators are. Another
# region costs money for every byte, and time.
check_region() {
  local region=${option[zone]%-*} location bucket ask
  while read -r bucket; do
    ask=(gcloud storage buckets describe "$bucket" "--project=${option[project]}" "--format=value(location)")
    if [ -n "${option[dry-run]}" ]; then
      note "this bucket must be in $region:"
      show "${ask[@]}"
      continue
    fi
    location=$("${ask[@]}") || fail "$bucket cannot be looked up; does it exist, and may you see it?"
    location=${location,,}
    if [ "$location" = "$region" ]; then continue; fi
    [ -n "${option[any-region]}" ] \
      || fail "$bucket is in $location and the machines would be in $region: every byte between them is billed;" \
        "take a bucket in $region, or give --any-region"
    say "note: $bucket is in $location, the machines in $region, and every byte between them is billed"
  done < <(printf '%s\n' "${option[bucket]}" "${words[@]:1}" | grep -o 'gs://[a-z0-9][-a-z0-9_.]*' | sort -u)
}

# --- commands --------------------------------------------------------------------------------------------------------

# One word as a shell reads it.
quote() {
  if [[ "$1" =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then printf '%s' "$1"; else printf "'%s'" "${1//\'/\'\\\'\'}"; fi
}

quote_all() {
  local word separator=
  for word in "$@"; do printf '%s' "$separator"; quote "$word"; separator=' '; done
}

# A command, as it would be typed; long ones with an option to a line.
show() {
  local line word
  line=$(quote_all "$@")
  if [ "${#line}" -gt 110 ]; then
    line=$(quote "$1")
    shift
    for word in "$@"; do
      if [[ "$word" == -* ]]; then line+=$' \\\n    '; else line+=' '; fi
      line+=$(quote "$word")
    done
  fi
  printf '%s\n' "$line"
}

note() { printf '# %s\n' "$*"; }

# run COMMAND…: runs it, or prints it where this is a dry run.
run() { if [ -n "${option[dry-run]}" ]; then show "$@"; else "$@"; fi; }

# pause_seconds N: how long to wait before the N-th start in a row that came to nothing; 10 s, doubled, at most 10 min.
pause_seconds() {
  local seconds=$((10 * 2 ** ($1 < 7 ? $1 : 7)))
  printf '%s' $((seconds < 600 ? seconds : 600))
}

# Waits some seconds; a signal that is trapped ends it at once, not after them.
nap() { sleep "$1" & wait $!; }

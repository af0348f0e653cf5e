# shellcheck shell=bash
# TPU slices by name: chips, hosts, and what Cloud TPU and GKE call them. Sourced by the launchers.
# shellcheck disable=SC2034  # what is set here is for those that source this
#
# The number in a name counts cores for v4, v5p and tpu7x (two a chip), and chips for v5e and v6e.

TPU_FAMILIES="v4-, v5e- (or v5litepod-), v5p-, v6e- and tpu7x-"

# read_tpu_type NAME sets tpu_family, tpu_chips, tpu_topology, tpu_chips_per_host, tpu_hosts (per slice, as GKE has it),
# tpu_accelerator_type and tpu_runtime (of Cloud TPU; empty where only GKE offers it), and tpu_gke (GKE's node label).
read_tpu_type() {
  local name=$1 number
  name=${name/#v5litepod-/v5e-}
  [[ "$name" =~ ^(v4|v5e|v5p|v6e|tpu7x)-([1-9][0-9]{0,4})$ ]] \
    || fail "--type is '$1'; types are $TPU_FAMILIES with a number, such as v5p-512 or v6e-256"
  tpu_family=${BASH_REMATCH[1]} number=${BASH_REMATCH[2]}
  tpu_accelerator_type=$name
  case $tpu_family in
    v4) tpu_runtime=tpu-ubuntu2204-base tpu_gke=tpu-v4-podslice ;;
    v5p) tpu_runtime=v2-alpha-tpuv5 tpu_gke=tpu-v5p-slice ;;
    v5e) tpu_runtime=v2-alpha-tpuv5-lite tpu_gke=tpu-v5-lite-podslice tpu_accelerator_type=v5litepod-$number ;;
    v6e) tpu_runtime=v2-alpha-tpuv6e tpu_gke=tpu-v6e-slice ;;
    tpu7x) tpu_runtime='' tpu_gke=tpu7x ;;
  esac
  case $tpu_family in
    v5e | v6e) tpu_chips=$number tpu_topology=$(flat_topology "$number") ;;
    *) tpu_chips=$((number / 2)) tpu_topology=$(cubic_topology $((number / 2))) ;;
  esac
  if [ -z "$tpu_topology" ] || [ "$tpu_chips" -gt "$(largest_slice)" ] \
    || [ "$tpu_chips" -lt "$(smallest_slice)" ] || [[ "$number" =~ [3579]$ ]]; then
    fail "there is no slice $1; the number counts $(what_counts), and common slices are $(common_types)"
  fi
  # Slices of more than 8 chips are made of hosts with 4; v5e-8 and v6e-8 are one host.
  tpu_chips_per_host=4
  if [ "$tpu_chips" = 1 ]; then tpu_chips_per_host=1; fi
  case $tpu_family-$tpu_chips in v5e-8 | v6e-8) tpu_chips_per_host=8 ;; esac
  tpu_hosts=$((tpu_chips / tpu_chips_per_host))
}

flat_topology() {
  case $1 in
    1) echo 1x1 ;; 4) echo 2x2 ;; 8) echo 2x4 ;; 16) echo 4x4 ;; 32) echo 4x8 ;; 64) echo 8x8 ;; 128) echo 8x16 ;;
    256) echo 16x16 ;;
  esac
}

cubic_topology() {
  case $1 in
    1) echo 1x1x1 ;; 4) echo 2x2x1 ;; 8) echo 2x2x2 ;; 16) echo 2x2x4 ;; 32) echo 2x4x4 ;; 64) echo 4x4x4 ;;
    128) echo 4x4x8 ;; 192) echo 4x4x12 ;; 256) echo 4x8x8 ;; 384) echo 4x8x12 ;; 512) echo 8x8x8 ;; 768) echo 8x8x12 ;;
    1024) echo 8x8x16 ;; 1536) echo 8x12x16 ;; 2048) echo 8x16x16 ;; 3072) echo 12x16x16 ;; 4096) echo 16x16x16 ;;
    6144) echo 16x16x24 ;;
  esac
}

largest_slice() { case $tpu_family in v5e | v6e) echo 256 ;; v5p) echo 6144 ;; *) echo 4096 ;; esac; }
smallest_slice() { case $tpu_family in v4 | v5p) echo 4 ;; *) echo 1 ;; esac; }
what_counts() { case $tpu_family in v5e | v6e) echo chips ;; *) echo "cores, two a chip" ;; esac; }
common_types() {
  case $tpu_family in
    v5e | v6e) echo "$tpu_family-1, -4, -8, -16, -32, -64, -128 and -256" ;;
    *) echo "$tpu_family-8, -16, -32, -64, -128, -256, -512, -1024 and on" ;;
  esac
}

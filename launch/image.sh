#!/usr/bin/env bash
# Builds the image that GKE and container clusters run, from this checkout, and pushes it.
#
#   ./launch/image.sh --image=us-east5-docker.pkg.dev/my-project/unclip/unclip_jax --extras=tpu
#
# Its tag is the commit, with -changed where the checkout has changes that are not committed. The name with the tag is
# the last line that it prints. The registry should lie in the region of the machines, for every host pulls gigabytes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/command_line.sh
. launch/command_line.sh

define image "" "REGISTRY/NAME, without a tag"
define extras tpu "tpu, cuda12 or cuda13; cpu for none"
define_flag no-push "leave it on this machine"
read_options "$@"

need_options image
[ "${#words[@]}" = 0 ] || fail "image.sh takes options only, not ${words[0]}"
[[ "${option[image]}" =~ ^[a-z0-9]+([._-]+[a-z0-9]+)*(:[0-9]+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)*$ ]] \
  || fail "--image is '${option[image]}'; it is written REGISTRY/NAME in small letters, and the commit becomes its tag"
[[ "${option[extras]}" =~ ^(tpu|cuda12|cuda13|cpu)$ ]] \
  || fail "--extras is '${option[extras]}'; it is one of tpu, cuda12, cuda13 and cpu"
need_tools docker git

tag=$(git rev-parse --verify --quiet --short=12 HEAD) || fail "this checkout has no commit to name the image after"
git diff --quiet HEAD -- || tag+=-changed
image=${option[image]}:$tag
extras=${option[extras]#cpu}

run docker build --file=launch/Dockerfile "--build-arg=EXTRAS=$extras" "--tag=$image" .
[ -n "${option[no-push]}" ] || run docker push "$image"
[ -n "${option[dry-run]}" ] || printf '%s\n' "$image"

#!/usr/bin/env bash
# Build the image of credit with what this machine has.
usage() { cat <<'USAGE'
usage: containers/build.sh sif|oci [options]

  sif   an Apptainer image, from containers/credit.def, with apptainer or singularity
  oci   a Docker image, from containers/Dockerfile, with docker, podman or buildah

  --from BASE          default docker.io/library/python:3.11-slim-bookworm, which gets torch for the CPU. For GPUs an image of
                       their vendor, whose own torch (2.13 or newer) is used: nvcr.io/nvidia/pytorch:YY.MM-py3, or
                       docker.io/rocm/pytorch:TAG. Without a registry: a folder or tar file with a root file system,
                       or a tar file of `docker save`.
  --arch amd64|arm64   of another machine (default: of this one)
  --tool TOOL          default: the first of the above that is here
  --output NAME        default credit.sif, or credit:latest
  --dry-run            print the command, build nothing

Packages come from where pip looks on this machine: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_CERT, and the folder
PIP_FIND_LINKS go into the build, and stay out of the image. A torch that the base lacks comes from TORCH_INDEX (default
https://download.pytorch.org/whl/cpu), unless PIP_FIND_LINKS has it.

  containers/build.sh sif
  containers/build.sh sif --from nvcr.io/nvidia/pytorch:26.08-py3 --arch arm64        for GH200
  containers/build.sh oci --tool podman --from base.tar
USAGE
}
set -euo pipefail
fail() { echo "build.sh: error: $*" >&2; exit 2; }
cd "$(dirname "$0")/.."

kind=${1:-} from=docker.io/library/python:3.11-slim-bookworm arch="" tool="" output="" dry=""
case $kind in sif | oci) shift ;; -h | --help) usage; exit ;; *) usage >&2; fail "which image: sif or oci?" ;; esac
while [ $# -gt 0 ]; do
  case $1 in
    --from | --arch | --tool | --output) [ $# -gt 1 ] || fail "$1 needs a value"; declare "${1#--}=$2"; shift 2 ;;
    --dry-run) dry=yes; shift ;;
    -h | --help) usage; exit ;;
    *) fail "there is no option $1 (--help lists them)" ;;
  esac
done
case $kind in
  sif) tools="apptainer singularity" output=${output:-credit.sif} ;;
  oci) tools="docker podman buildah" output=${output:-credit:latest} ;;
esac
for one in $tools; do
  [ -n "$tool" ] || ! command -v "$one" > /dev/null || tool=$one
done
[ -n "$tool" ] || fail "none of $tools is here: install one, or build on another machine"
[[ " $tools " == *" $tool "* ]] || fail "$tool does not build a $kind image; $tools do"

work=$(mktemp -d "${TMPDIR:-/tmp}/credit-build.XXXXXX")
trap 'rm -rf "$work"' EXIT
run() { if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@" < /dev/null; fi; }

# What pip needs from this machine, bound over /mnt while it builds.
mkdir -p "$work/mnt/wheels"
{
  echo "[global]"
  if [ -n "${PIP_INDEX_URL:-}" ]; then echo "index-url = $PIP_INDEX_URL"; fi
  if [ -n "${PIP_EXTRA_INDEX_URL:-}" ]; then echo "extra-index-url = $PIP_EXTRA_INDEX_URL"; fi
  if [ -n "${PIP_CERT:-}" ]; then cp -L "$PIP_CERT" "$work/mnt/ca.crt"; echo "cert = /mnt/ca.crt"; fi
  if [ -d "${PIP_FIND_LINKS:-}" ]; then echo "find-links = /mnt/wheels"; fi
} > "$work/mnt/pip.conf"
chmod -R a+rX "$work"
binds=("$work/mnt:/mnt:ro")
if [ -d "${PIP_FIND_LINKS:-}" ]; then binds+=("$(realpath "$PIP_FIND_LINKS"):/mnt/wheels:ro"); fi
index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}
if compgen -G "${PIP_FIND_LINKS:-/nowhere}/torch-*.whl" > /dev/null; then index=""; fi

version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' credit/__init__.py)
revision=unknown SOURCE_DATE_EPOCH=0
if [ "$(git rev-parse --show-toplevel 2> /dev/null)" = "$PWD" ]; then  # not a repository around these sources
  revision=$(git rev-parse HEAD)
  if [ -n "$(git status --porcelain -- pyproject.toml constraints.txt credit configs hpc containers)" ]; then
    revision+=-dirty
  fi
  SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
fi
export SOURCE_DATE_EPOCH  # two builds of a commit differ in no time stamp
arguments=(PIP_CONFIG_FILE=/mnt/pip.conf "TORCH_INDEX=$index" "VERSION=$version" "REVISION=$revision")

is_saved_image() { tar tf "$1" | grep -qx manifest.json; }

build_sif() {
  local bootstrap=docker image=${from#docker.io/} options=()
  if [ -d "$image" ]; then
    bootstrap=localimage image=$(realpath "$image")
  elif [ -f "$image" ] && is_saved_image "$image"; then
    bootstrap=docker-archive image=$(realpath "$image")
  elif [ -f "$image" ]; then
    mkdir "$work/base"
    tar -C "$work/base" --exclude='./dev/*' -xpf "$image"
    bootstrap=localimage image=$work/base
  fi
  # Root without CAP_SYS_RESOURCE (bit 24), as in some containers, is to apptainer as any other user.
  local capabilities
  capabilities=$(sed -n 's/^CapEff:\t//p' /proc/self/status)
  if [ "$(id -u)" != 0 ] || ! (( 0x$capabilities >> 24 & 1 )); then options+=(--fakeroot); fi
  if [ -n "$arch" ]; then options+=(--arch "$arch"); fi
  for one in "BOOTSTRAP=$bootstrap" "BASE=$image" "${arguments[@]}"; do options+=(--build-arg "$one"); done
  for one in "${binds[@]}"; do options+=(--bind "$one"); done
  run "$tool" build --force "${options[@]}" --mksquashfs-args "-comp zstd -Xcompression-level 6" \
    "$output" containers/credit.def
}

build_oci() {
  local image=$from options=() command=("$tool" build)
  if [ -d "$image" ] || [ -f "$image" ]; then
    [ "$tool" != buildah ] || ! [ -d "$image" ] || fail "buildah takes a tar file, not a folder: tar -C $image -cf base.tar ."
    image=$(load_base "$image")
  fi
  case $tool in
    # docker binds nothing in a build: what pip needs must be reachable, or configured in the base.
    docker) arguments=("${arguments[@]:1}") ;;
    *)
      options+=(--format docker --timestamp "$SOURCE_DATE_EPOCH" --network host)  # OCI's own format has no HEALTHCHECK
      for one in "${binds[@]}"; do options+=(--volume "$one"); done
      ;;
  esac
  if [ -n "$arch" ]; then options+=(--platform "linux/$arch"); fi
  for one in "BASE_IMAGE=$image" "${arguments[@]}"; do options+=(--build-arg "$one"); done
  run "${command[@]}" "${options[@]}" --file containers/Dockerfile --tag "$output" .
}

# The name under which a tar file or a folder is known after it has been loaded.
load_base() {
  local name=localhost/credit-base:latest
  if [ -d "$1" ]; then
    tar -C "$1" -cf "$work/base.tar" .
    set -- "$work/base.tar"
  fi
  case $tool in
    buildah)
      local container
      container=$(buildah from scratch)
      buildah add --quiet "$container" "$1" / > /dev/null
      buildah commit --quiet --rm "$container" "$name" > /dev/null
      ;;
    *) if is_saved_image "$1"; then "$tool" load --quiet --input "$1" | sed 's/^Loaded image[^:]*: //'; return; fi
      "$tool" import "$1" "$name" > /dev/null ;;
  esac
  echo "$name"
}

"build_$kind"
if [ -z "$dry" ]; then echo "$output: credit $version, revision $revision"; fi

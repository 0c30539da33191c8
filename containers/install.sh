#!/bin/sh
# Install credit and what it needs into /opt/credit, inside a base image. The one recipe of Dockerfile and credit.def.
#   install.sh SOURCE      SOURCE is a checkout, or what `credit init --container` writes
# PIP_CONFIG_FILE and TORCH_INDEX, if not empty, say where packages come from.
set -eu
cd "$1"
target=/opt/credit
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
[ -n "${PIP_CONFIG_FILE:-}" ] || unset PIP_CONFIG_FILE

# A GPU vendor's base brings a torch built for it, which stays, with all it came with. Else everything is ours.
if theirs=$(python3 -c 'import torch; print(torch.__version__)' 2> /dev/null); then
    python3 -c 'import sys; sys.exit(tuple(map(int, sys.argv[1].split(".")[:2])) < (2, 13))' "$theirs" || {
        echo "install.sh: error: the base has torch $theirs, credit needs 2.13 or newer: take a newer base" >&2
        exit 2
    }
    python3 -m venv --system-site-packages $target
    $target/bin/pip list --format=freeze --exclude pip | tee /tmp/base.txt
    sed 's/==.*//' /tmp/base.txt > /tmp/names.txt
    { cat /tmp/base.txt; grep -viwFf /tmp/names.txt constraints.txt || true; } > /tmp/constraints.txt
else
    python3 -m venv $target
    cp constraints.txt /tmp/constraints.txt
    [ -z "${TORCH_INDEX:-}" ] || export PIP_EXTRA_INDEX_URL="$TORCH_INDEX"
fi

# The build of the wheel takes its tools from the constraints too.
export PIP_CONSTRAINT=/tmp/constraints.txt
$target/bin/pip wheel --quiet --no-deps --wheel-dir /tmp/wheel .
wheel=$(echo /tmp/wheel/*.whl)
$target/bin/pip install --quiet "${wheel}[plots,mpi,remote]"

# What nobody runs: test suites, generated C, headers (there is no compiler), and the installer itself.
$target/bin/pip uninstall --quiet --yes pip
packages=$(echo $target/lib/python3*/site-packages)
find "$packages" -type d \( -name tests -o -name test -o -name include \) -prune -exec rm -rf {} +
find "$packages" \( -name '*.c' -o -name 'lib*_test.so' \) -delete
rm -rf "$packages"/torch/bin/test_* "$packages"/torch/bin/*Test "$packages"/torch/bin/protoc* /tmp/wheel /tmp/base.txt /tmp/names.txt /tmp/constraints.txt

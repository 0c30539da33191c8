#!/usr/bin/env bash
# The packages of an image as a software bill of materials (CycloneDX JSON), resolved as install.sh installs them, with
# the hash of each file. Torch's is that of the index at hand: CPU or CUDA.
#
#   containers/sbom.sh [PYTHON [FILE]]        the python must have cyclonedx-bom (make sbom)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
file=${2:-build/credit.cdx.json}
extras=$(grep -o '\[plots[a-z,]*\]' containers/install.sh)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$(dirname "$file")"
"$python" -m pip install --quiet --dry-run --ignore-installed --constraint constraints.txt \
  --report "$work/report.json" ".$extras"
"$python" - "$work/report.json" > "$work/requirements.txt" <<'END'
import json
import sys

for one in json.load(open(sys.argv[1]))["install"]:
    hashes = one["download_info"].get("archive_info", {}).get("hashes", {})
    marks = "".join(f" --hash={name}:{value}" for name, value in hashes.items())
    if one["metadata"]["name"] != "credit-hpc":
        print(f"{one['metadata']['name']}=={one['metadata']['version']}{marks}")
END
"$python" -m cyclonedx_py requirements "$work/requirements.txt" --pyproject pyproject.toml --output-reproducible \
  --of JSON --output-file "$file"
echo "$file: $(wc -l < "$work/requirements.txt") packages"

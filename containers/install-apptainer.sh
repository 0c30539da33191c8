#!/usr/bin/env bash
# Apptainer on Debian 12, which has none: Debian's own package of a later suite, whose two programs are pointed at that
# suite's C library. Fetched and checked by apt, without a change to this machine's sources. Root; a minute.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"  # apt's own user reads it
mkdir -p "$work"/{lists/partial,cache/archives/partial,packages,tree,libc}
awk '/^Suites:/ {print "Suites: sid"; next} /^Components:/ {print "Components: main"; next} /^$/ {exit} {print}' \
  /etc/apt/sources.list.d/debian.sources > "$work/sid.sources"
apart=(-q -o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/cache" -o "Dir::Etc::SourceList=$work/sid.sources"
  -o Dir::Etc::SourceParts=/dev/null -o Dir::Etc::PreferencesParts=/dev/null -o APT::Get::List-Cleanup=0
  -o Acquire::Languages=none -o APT::Sandbox::User=root)
apt-get "${apart[@]}" update
(cd "$work/packages" && apt-get "${apart[@]}" download apptainer libc6)
apt-get -q update
apt-get install -y -q --no-install-recommends patchelf
dpkg-deb -R "$work"/packages/apptainer_*.deb "$work/tree"
dpkg-deb -x "$work"/packages/libc6_*.deb "$work/libc"
own=$(echo /usr/lib/*-linux-gnu)/apptainer
mkdir -p "$work/tree$own/libc"
from=$(dirname "$(find "$work/libc" -name libc.so.6 | head -n 1)")
loader=$(cd "$from" && echo ld-linux-*)
cp -L "$from"/{"$loader",libc.so.6,libm.so.6,libdl.so.2,libpthread.so.0,librt.so.1,libresolv.so.2} "$from"/libnss_{files,dns}.so.2 \
  "$work/tree$own/libc/"
for program in "$work/tree/usr/bin/apptainer" "$work/tree$own/bin/starter"; do
  patchelf --set-interpreter "$own/libc/$loader" --force-rpath --set-rpath "$own/libc" "$program"
done
sed -i -E -e 's/^(Version: .*)$/\1~local/' -e '/^Depends:/s/libc6 \(>= [^)]*\)/libc6/' -e '/^(Built-Using|Static-Built-Using):/d' \
  "$work/tree/DEBIAN/control"
(cd "$work/tree" && find . -type f ! -path './DEBIAN/*' -printf '%P\0' | xargs -0 md5sum > DEBIAN/md5sums)
dpkg-deb -Znone --root-owner-group -b "$work/tree" "$work/apptainer.deb" > /dev/null
chmod 644 "$work/apptainer.deb"
apt-get install -y -q --no-install-recommends "$work/apptainer.deb" squashfuse fuse-overlayfs fakeroot
apptainer --version

#!/usr/bin/env bash
# The README's first two commands on a bare machine: a minimal Debian with git, make and python3, and
# a fresh clone of what is committed here. As root on Debian with debootstrap; half an hour. It says
# after how many seconds, from the clone on, the first photo has its mask.
#
#   docker/test/bare.sh                          make serve until there is a mask, then make test THOROUGH=1
#   docker/test/bare.sh tests/docker             make serve, lint, and pytest with these arguments
#   KEEP=1 ROOTFS=/var/tmp/bare docker/test/bare.sh      leave the root there, and use it again
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
rootfs=${ROOTFS:-$(mktemp -d /var/tmp/slsnet-bare.XXXXXX)}

say() { printf '== %s\n' "$*"; }
inside() { # COMMAND: in the clone, without anything of this machine's environment
    chroot "$rootfs" /usr/bin/env -i HOME=/root PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin \
        LANG=C.UTF-8 PIP_ROOT_USER_ACTION=ignore sh -ec "cd /root/slsnet; $1"
}
end() {
    for mounted in "${mounts[@]}"; do umount "$mounted"; done
    # Only once nothing of this machine is mounted there any more.
    [ -n "${KEEP:-}" ] || grep -q " $rootfs/" /proc/mounts || rm -rf "$rootfs"
}
mounts=()

command -v debootstrap >/dev/null || { say "needs debootstrap: apt-get install debootstrap"; exit 2; }
if [ ! -e "$rootfs/usr/bin/git" ]; then
    say "making a minimal Debian in $rootfs"
    debootstrap --variant=minbase --include=git,make,python3,python3-venv,ca-certificates \
        "${RELEASE:-bookworm}" "$rootfs" >"$rootfs.log" || { tail "$rootfs.log" >&2; exit 1; }
fi
trap end EXIT
for folder in /proc /dev; do
    mount --rbind "$folder" "$rootfs$folder"
    mount --make-rslave "$rootfs$folder"
done
# What has others mounted in it comes off in one go.
umount() { command umount --recursive "$1"; }
mounts=("$rootfs/dev" "$rootfs/proc")

say "what pip and TLS are told on this machine holds there too"
cp -L /etc/resolv.conf "$rootfs/etc/resolv.conf"
cp -L /etc/ssl/certs/ca-certificates.crt "$rootfs/etc/ssl/certs/ca-certificates.crt"
configuration=$(python3 -m pip config debug 2>/dev/null | sed -n 's/^ *\(\/.*\), exists: True$/\1/p')
# Folders of packages that the configuration names, and files of constraints. The files of an index
# called simple lie beside it.
# shellcheck disable=SC2086
named=$([ -z "$configuration" ] || grep -hoE '(file://|[ =])/[^ ]+' $configuration |
    sed -E 's/^(file:\/\/|[ =])//; s/\/simple\/?$//' | sort -u)
for path in $configuration $named; do
    if [ ! -e "$path" ] || mountpoint -q "$rootfs$path"; then continue; fi
    mkdir -p "$rootfs$(dirname "$path")"
    if [ -d "$path" ]; then mkdir -p "$rootfs$path"; else touch "$rootfs$path"; fi
    mount --bind -o ro "$path" "$rootfs$path"
    mounts+=("$rootfs$path")
done

say "cloning $(git rev-parse --short HEAD)"
rm -rf "$rootfs/root/slsnet"
began=$(date +%s.%N)
git clone --quiet --no-hardlinks . "$rootfs/root/slsnet"

say "make serve"
# shellcheck disable=SC2016
inside '
rm -f /root/ended
setsid sh -c "make serve PORT=18098; touch /root/ended" & server=$!
python3 - '"$began"' <<END
import os, sys, time, urllib.request
give_up = time.monotonic() + 900
while True:
    if os.path.exists("/root/ended"):
        sys.exit("make serve has ended by itself")
    try:
        urllib.request.urlopen("http://127.0.0.1:18098/health/ready", timeout=5)
        break
    except OSError:
        if time.monotonic() > give_up:
            raise
        time.sleep(0.5)
with open("docs/lesion.jpg", "rb") as photo:
    asked = urllib.request.Request(
        "http://127.0.0.1:18098/segment", photo.read(), {"Content-Type": "image/jpeg"}
    )
mask = urllib.request.urlopen(asked, timeout=60).read()
took = time.time() - float(sys.argv[1])
if mask[1:4] != b"PNG":
    sys.exit("the answer is no mask")
print(f"== first mask {took:.0f} s after the clone began")
END
kill -- -$server; wait $server || true'

say "make test"
if [ $# -eq 0 ]; then
    inside "make test THOROUGH=1"
else
    inside "make lint; .venv/bin/python -m pytest $*"
fi
say "passed on a bare machine in $SECONDS s"

#!/usr/bin/env bash
# Build what docker/ has, run it, and hold it against what it promises.
#
#   docker/test.sh                       all parts: image stack kubernetes gpu (docker/test/*.sh)
#   docker/test.sh image stack           these alone
#   PYTHON_IMAGE=… docker/test.sh        another base image; PROMETHEUS_IMAGE, GRAFANA_IMAGE likewise
#   KEEP=1 docker/test.sh                leave the image, slsnet:test, where it is
#
# Docker where an engine runs. Without it this must be root on Debian: it installs buildah and
# podman, makes its base image with debootstrap and keeps all images in its own folder, $STORE.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck disable=SC2034 # for the parts
root=$PWD
# shellcheck source=docker/test/engine.sh
. docker/test/engine.sh
[ $# -gt 0 ] || set -- image stack kubernetes gpu
for part; do
    say "---- $part"
    # shellcheck source=/dev/null
    . "docker/test/$part.sh"
done
say "all passed in $SECONDS s"

#!/usr/bin/env bash
# Build the CPU image and hold it against what it promises.
#
#   docker/test.sh                       Docker where an engine runs, else buildah and podman
#   PYTHON_IMAGE=… docker/test.sh        another base image
#   KEEP=1 docker/test.sh                leave the image, slsnet:test, where it is
#
# Without Docker it must be root on Debian: it installs what is missing, makes a base image with
# debootstrap and keeps all images in its own folder, $STORE, beside those of the machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
image=localhost/slsnet:test
port=${PORT:-18099}
url=http://127.0.0.1:$port
photo=/source/trt_build/reference/lesion_000.jpg
truth=/source/trt_build/reference/lesion_000_segmentation.png
most_bytes=450000000
STORE=${STORE:-/var/tmp/slsnet-images}
ca=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}

say() { printf '== %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }
now_ms() { date +%s%3N; }
try() { # WHAT COMMAND…: repeat for a minute
    local deadline=$((SECONDS + 60))
    until "${@:2}"; do
        [ $SECONDS -lt $deadline ] || fail "$1"
        sleep 0.1
    done
}

# ---- an engine ------------------------------------------------------------------------------
created=$(git log -1 --format=%ct 2>/dev/null || echo 0)
build_args=(
    --build-arg "SOURCE_DATE_EPOCH=$created"
    --build-arg "CREATED=$(date -u -d "@$created" +%Y-%m-%dT%H:%M:%SZ)"
    --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)"
    --file docker/Dockerfile
)
[ ! -s "$ca" ] || build_args+=(--secret "id=ca,src=$ca")
hardened=(--read-only --cap-drop=ALL --security-opt=no-new-privileges)
if docker info >/dev/null 2>&1; then
    say "Docker $(docker version --format '{{.Server.Version}}')"
    engine() { docker "$@"; }
    build() { DOCKER_BUILDKIT=1 docker build --quiet --no-cache "${build_args[@]}" -t "$1" .; }
    # A host's network is the engine's, which need not be this machine.
    server_network=(--publish "127.0.0.1:$port:$port")
    client_network=(--network "container:server-$port")
    [ -z "${PYTHON_IMAGE:-}" ] || build_args+=(--build-arg "PYTHON_IMAGE=$PYTHON_IMAGE")
    repeatable=
else
    missing=()
    for tool in buildah podman runc debootstrap; do
        command -v $tool >/dev/null || missing+=("$tool")
    done
    if [ "${#missing[@]}" -gt 0 ]; then
        say "installing ${missing[*]}"
        apt-get update -qq </dev/null
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            buildah podman runc debootstrap netavark aardvark-dns </dev/null >/dev/null
    fi
    # Timers of health checks need systemd; without it they are asked for by hand.
    export DISABLE_HC_SYSTEMD=true
    mkdir -p "$STORE"/{lower,upper,work,merged}
    driver=vfs # copies a layer for each step: slow, but works everywhere
    if mount -t overlay overlay "$STORE/merged" -o \
        "lowerdir=$STORE/lower,upperdir=$STORE/upper,workdir=$STORE/work" 2>/dev/null; then
        umount "$STORE/merged"
        driver=overlay
    fi
    storage=(--root "$STORE/$driver" --runroot "$STORE/run-$driver" --storage-driver "$driver")
    say "buildah $(buildah --version | cut -d' ' -f3) and $(podman --version), storage: $driver"
    engine() { podman "${storage[@]}" --runtime runc "$@"; }
    build() {
        buildah "${storage[@]}" bud --quiet --layers --no-cache --isolation chroot \
            --format docker --timestamp "$created" "${build_args[@]}" -t "$1" .
    }
    hardened+=(--read-only-tmpfs=false --ulimit nofile=1024:1024 --ulimit nproc=1024:1024)
    server_network=(--network host)
    client_network=(--network host)
    if [ -z "${PYTHON_IMAGE:-}" ]; then
        PYTHON_IMAGE=localhost/slsnet-python:trixie
        if ! engine image exists "$PYTHON_IMAGE"; then
            say "base image: Debian trixie, by debootstrap"
            system=$(mktemp -d "$STORE/trixie.XXXX")
            debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
                trixie "$system" >"$STORE/debootstrap.log" 2>&1 || fail "$STORE/debootstrap.log"
            rm -rf "$system"/var/cache/apt/archives/*.deb "$system"/var/lib/apt/lists/*
            tar -C "$system" -cf - . | engine import --quiet - "$PYTHON_IMAGE" >/dev/null
            rm -rf "$system"
        fi
    fi
    build_args+=(--build-arg "PYTHON_IMAGE=$PYTHON_IMAGE")
    repeatable=1
fi

server=server-$port
client=client-$port
output=$(mktemp -d)
clean_up() {
    engine rm -f "$server" "$client" >/dev/null 2>&1 || true
    rm -rf "$output"
    [ -n "${KEEP:-}" ] || engine rmi -f "$image" "$image-again" >/dev/null 2>&1 || true
    # Steps of the builds, in the folder of this test; Docker's are not this test's to remove.
    [ -z "$repeatable" ] || engine image prune -f >/dev/null 2>&1 || true
}
trap clean_up EXIT

start() { # OPTION…: a server in the background
    engine run -d --name "$server" "${hardened[@]}" "${server_network[@]}" \
        -e SLSNET_PORT="$port" "$@" "$image" >/dev/null
}
ask() { # COMMAND…: of test/client.py, in a container of its own
    engine run --rm "${hardened[@]}" "${client_network[@]}" -v "$root:/source:ro" \
        --entrypoint python "$image" /source/docker/test/client.py "$@"
}
healthy() { engine exec "$server" python /opt/slsnet/health.py; }
unhealthy() { ! healthy; }
under_load() { grep -qs "under load" "$output/load" || ! kill -0 "$loading" 2>/dev/null; }
ready() ( # without the start of the health check's Python
    exec 3<>"/dev/tcp/127.0.0.1/$port" || exit 1
    printf 'GET /health/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' >&3
    grep -q '^HTTP/1.1 200' <&3
) 2>/dev/null
end() { # EXIT CODE WHAT
    local code
    code=$(engine wait "$server")
    engine logs "$server" >"$output/server.log" 2>&1
    engine rm "$server" >/dev/null
    [ "$code" = "$1" ] || { cat "$output/server.log" >&2; fail "$2 ended with $code, not $1"; }
}

# ---- the image ------------------------------------------------------------------------------
started=$(now_ms)
build "$image" >"$output/build.log" 2>&1 || { tail -40 "$output/build.log" >&2; fail "the build"; }
say "built in $((($(now_ms) - started) / 1000)) s"
bytes=$(engine image inspect "$image" --format '{{.Size}}')
say "size: $((bytes / 1000000)) MB; layers, the newest first:"
engine history --no-trunc --format '{{.Size}}	{{.CreatedBy}}' "$image" | grep -v '^0 \?B' |
    sed -E 's/(.{110}).*/\1…/'
[ "$bytes" -le $most_bytes ] || fail "larger than $((most_bytes / 1000000)) MB"
engine image inspect "$image" --format '{{json .Config.Labels}}'
if [ -n "$repeatable" ]; then
    build "$image-again" >"$output/build.log" 2>&1 || fail "the second build"
    for tag in "$image" "$image-again"; do
        engine image inspect "$tag" --format '{{range .RootFS.Layers}}{{println .}}{{end}}' \
            >"$output/layers.${tag##*:}"
    done
    diff "$output"/layers.* || fail "two builds differ"
    say "a second build gave the same $(grep -c sha256 "$output/layers.test") layers"
fi
# shellcheck disable=SC2016 # for the container's shell to expand
engine run --rm "${hardened[@]}" --network none --entrypoint sh "$image" -c '
    test "$(id -u):$(id -g)" = 10001:10001 || { echo "is $(id)"; exit 1; }
    for tool in cc gcc g++ make; do ! command -v $tool || exit 1; done
    ! touch /opt/slsnet/x /tmp/x 2>/dev/null || { echo "can write"; exit 1; }
    ! find /opt /etc/passwd -perm /go+w -not -type l | grep . || exit 1
    grep -q "^CapEff:.*0000000000000000$" /proc/self/status || { echo "has capabilities"; exit 1; }
    ' || fail "the container is not as locked up as it should be"
engine run --rm "${hardened[@]}" --network none -v "$root:/source:ro" --entrypoint python \
    "$image" /source/docker/test/client.py bill || fail "the bill of materials"

# ---- a server in it -------------------------------------------------------------------------
started=$(now_ms)
start -e SLSNET_DRAIN_GRACE_S=5
try "the server was not healthy within a minute" healthy
say "healthy $(($(now_ms) - started)) ms after the command, its own check included"
ask segment "$url" "$photo" "$truth" || fail "segmentation"

# ---- stopped under load ---------------------------------------------------------------------
engine run --name "$client" "${hardened[@]}" "${client_network[@]}" -v "$root:/source:ro" \
    --entrypoint python "$image" /source/docker/test/client.py load "$url" "$photo" \
    >"$output/load" 2>&1 &
loading=$!
# The client ends at once if it loses a request: what it says then is told below.
try "no load within a minute" under_load
healthy || fail "not healthy under load"
engine kill --signal TERM "$server" >/dev/null
try "the health check did not turn while draining" unhealthy
[ "$(engine inspect "$server" --format '{{.State.Running}}')" = true ] || fail "ended undrained"
say "health check turned to unhealthy while the server drains"
wait $loading || { cat "$output/load" >&2; fail "requests were lost"; }
end 0 "a drained server"
say "SIGTERM under load: $(tail -1 "$output/load"); exit code 0"
engine rm "$client" >/dev/null

# ---- stopped while it starts ----------------------------------------------------------------
start
started=$(now_ms)
engine stop --time 30 "$server" >/dev/null
took=$(($(now_ms) - started))
[ $took -lt 15000 ] || fail "a stop during the start took $took ms"
engine rm "$server" >/dev/null
say "stopped during its start within $took ms"

# ---- from the command to ready ----------------------------------------------------------------
for _ in 1 2 3; do
    started=$(now_ms)
    start
    try "not ready" ready
    say "ready $(($(now_ms) - started)) ms after the command"
    engine stop --time 30 "$server" >/dev/null
    end 0 "an idle server"
done
say "all passed in $SECONDS s"

# What runs containers here, for the other scripts of this folder: Docker where an engine runs, else
# buildah and podman as root on Debian, with images and containers in a folder of their own, $STORE.
# shellcheck shell=bash disable=SC2034

image=localhost/slsnet:test
port=${PORT:-18099}
url=http://127.0.0.1:$port
STORE=${STORE:-/var/tmp/slsnet-images}
output=$(mktemp -d)
hardened=(--read-only --cap-drop=ALL --security-opt=no-new-privileges)

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
quietly() { # LOG COMMAND…: its output is shown only if it fails
    "${@:2}" >"$1" 2>&1 || { tail -40 "$1" >&2; fail "${*:2}"; }
}

created=$(git log -1 --format=%ct 2>/dev/null || echo 0)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
build_args=()
ca=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
[ ! -s "$ca" ] || build_args+=(--secret "id=ca,src=$ca")

use_docker() {
    say "Docker $(docker version --format '{{.Server.Version}}')"
    podman=
    engine() { docker "$@"; }
    build() { # TAG DOCKERFILE [OPTION…]
        DOCKER_BUILDKIT=1 docker build --quiet --no-cache "${build_args[@]}" \
            --file "$2" --tag "$1" "${@:3}" .
    }
    compose() { docker compose "$@"; }
    # As the image has it, but more often: a drain is over in seconds.
    health=(--health-interval 1s)
    health() { [ "$(engine inspect "$1" --format '{{.State.Health.Status}}')" = healthy ]; }
    # A host's network is the engine's, which need not be this machine.
    server_network=(--publish "127.0.0.1:$port:$port")
    client_network=(--network "container:server-$port")
    [ -z "${PYTHON_IMAGE:-}" ] || build_args+=(--build-arg "PYTHON_IMAGE=$PYTHON_IMAGE")
}

use_podman() {
    podman=1
    local package missing=()
    # The last ones are for the tests themselves; a browser for SCREENSHOT alone.
    for package in buildah podman runc debootstrap netavark aardvark-dns iptables catatonit \
        curl ca-certificates python3-venv ${SCREENSHOT:+chromium}; do
        dpkg --status "$package" >/dev/null 2>&1 || missing+=("$package")
    done
    if [ "${#missing[@]}" -gt 0 ]; then
        say "installing ${missing[*]}"
        quietly "$output/apt.log" apt-get update -qq </dev/null
        DEBIAN_FRONTEND=noninteractive quietly "$output/apt.log" \
            apt-get install -y -qq --no-install-recommends "${missing[@]}" </dev/null
    fi
    # Timers of health checks need systemd; without it they are asked for by hand.
    export DISABLE_HC_SYSTEMD=true
    health=()
    health() { engine healthcheck run "$1"; } # CONTAINER: by the image's HEALTHCHECK
    local driver=vfs # copies a layer for each step: slow, but works everywhere
    mkdir -p "$STORE"/{lower,upper,work,merged}
    if mount -t overlay overlay "$STORE/merged" -o \
        "lowerdir=$STORE/lower,upperdir=$STORE/upper,workdir=$STORE/work" 2>/dev/null; then
        umount "$STORE/merged"
        driver=overlay
    fi
    # Of buildah, of podman, and of what calls podman. Limits: inside another container the ones
    # that podman would set are refused.
    export CONTAINERS_STORAGE_CONF=$STORE/storage.conf CONTAINERS_CONF=$STORE/containers.conf
    printf '[storage]\ndriver = "%s"\ngraphroot = "%s"\nrunroot = "%s"\n' \
        "$driver" "$STORE/$driver" "$STORE/run-$driver" >"$CONTAINERS_STORAGE_CONF"
    printf '[engine]\nruntime = "runc"\n[network]\nnetwork_backend = "netavark"\n%s\n' \
        '[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]' >"$CONTAINERS_CONF"
    say "buildah $(buildah --version | cut -d' ' -f3) and $(podman --version), storage: $driver"
    engine() { podman "$@"; }
    build() { # TAG DOCKERFILE [OPTION…]
        local ignore=$2.dockerignore # which Docker finds by itself
        [ -e "$ignore" ] || ignore=.dockerignore
        buildah bud --quiet --layers --no-cache --isolation chroot --format docker \
            --timestamp "$created" --ignorefile "$ignore" "${build_args[@]}" --file "$2" \
            --tag "$1" "${@:3}" .
    }
    compose() { "$(tools)/podman-compose" "$@"; }
    hardened+=(--read-only-tmpfs=false)
    server_network=(--network host)
    client_network=(--network host)
    [ -n "${PYTHON_IMAGE:-}" ] || make_base
    build_args+=(--build-arg "PYTHON_IMAGE=$PYTHON_IMAGE")
}

make_base() { # sets PYTHON_IMAGE
    PYTHON_IMAGE=localhost/slsnet-python:trixie
    ! engine image exists "$PYTHON_IMAGE" || return 0
    say "base image: Debian trixie, by debootstrap"
    local system
    at_exit+=(remove_unpacked)
    system=$(mktemp -d "$STORE/trixie.XXXX")
    quietly "$STORE/debootstrap.log" debootstrap --variant=minbase \
        --include=python3,python3-venv,ca-certificates trixie "$system"
    rm -rf "$system"/var/cache/apt/archives/*.deb "$system"/var/lib/apt/lists/*
    tar -C "$system" -cf - . | engine import --quiet - "$PYTHON_IMAGE" >/dev/null
    rm -rf "$system"
}
remove_unpacked() { rm -rf "$STORE"/trixie.*; }

tools() { # the folder of what docker/requirements-tools.txt brings
    local folder=$STORE/tools
    # Each step by itself: in `$(tools)` no error ends the shell.
    if ! [ "$folder/.installed" -nt docker/requirements-tools.txt ]; then
        { python3 -m venv "$folder" && "$folder/bin/pip" install --quiet \
            --disable-pip-version-check -r docker/requirements-tools.txt &&
            touch "$folder/.installed"; } >&2 || return 1
    fi
    echo "$folder/bin"
}

size_and_layers() { # IMAGE: sets bytes, and prints
    bytes=$(engine image inspect "$1" --format '{{.Size}}')
    say "size: $((bytes / 1000000)) MB; layers, the newest first:"
    engine history --no-trunc --format '{{.Size}}	{{.CreatedBy}}' "$1" | grep -v '^0 \?B' |
        sed -E 's/(.{110}).*/\1…/'
}
need_image() { # the CPU image, where no test before has built it
    engine image inspect "$image" >/dev/null 2>&1 || quietly "$output/build.log" build_cpu "$image"
}
build_cpu() { # TAG
    build "$1" docker/Dockerfile --build-arg "SOURCE_DATE_EPOCH=$created" \
        --build-arg "CREATED=$(date -u -d "@$created" +%Y-%m-%dT%H:%M:%SZ)" \
        --build-arg "REVISION=$revision"
}

at_exit=()
loading=
clean_up() {
    local command
    [ -z "$loading" ] || kill "$loading" 2>/dev/null || true
    for command in ${at_exit[@]+"${at_exit[@]}"}; do
        $command >/dev/null 2>&1 || true
    done
    rm -rf "$output"
    command -v engine >/dev/null || return 0 # nothing was started yet
    [ -n "${KEEP:-}" ] || engine rmi -f "$image" "$image-again" >/dev/null 2>&1 || true
    # Steps of the builds, in the folder of this test; Docker's are not this test's to remove.
    [ -z "$podman" ] || engine image prune -f >/dev/null 2>&1 || true
}

trap clean_up EXIT
if docker info >/dev/null 2>&1; then use_docker; else use_podman; fi

# The CPU image: its size, its layers, how locked up it is, and a server in it that is stopped.
# shellcheck shell=bash disable=SC2154

photo=/source/trt_build/reference/lesion_000.jpg
truth=/source/trt_build/reference/lesion_000_segmentation.png
most_bytes=450000000
server=server-$port
client=client-$port
remove_containers() { engine rm -f "$server" "$client"; }
at_exit+=(remove_containers)

start() { # OPTION…: a server in the background
    engine run -d --name "$server" ${health[@]+"${health[@]}"} "${hardened[@]}" \
        "${server_network[@]}" \
        -e SLSNET_PORT="$port" "$@" "$image" >/dev/null
}
ask() { # COMMAND…: of client.py, in a container of its own
    engine run --rm "${hardened[@]}" "${client_network[@]}" -v "$root:/source:ro" \
        --entrypoint python "$image" /source/docker/test/client.py "$@"
}
healthy() { health "$server" >/dev/null 2>&1; }
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

build_and_measure() {
    local started bytes
    started=$(now_ms)
    quietly "$output/build.log" build_cpu "$image"
    say "built in $((($(now_ms) - started) / 1000)) s"
    size_and_layers "$image"
    [ "$bytes" -le $most_bytes ] || fail "larger than $((most_bytes / 1000000)) MB"
    engine image inspect "$image" --format '{{json .Config.Labels}}'
}

build_again() {
    local tag
    quietly "$output/build.log" build_cpu "$image-again"
    for tag in "$image" "$image-again"; do
        engine image inspect "$tag" --format '{{range .RootFS.Layers}}{{println .}}{{end}}' \
            >"$output/layers.${tag##*:}"
    done
    diff "$output"/layers.* || fail "two builds differ"
    say "a second build gave the same $(grep -c sha256 "$output/layers.test") layers"
}

look_inside() {
    # shellcheck disable=SC2016 # for the container's shell to expand
    engine run --rm "${hardened[@]}" --network none --entrypoint sh "$image" -c '
        test "$(id -u):$(id -g)" = 10001:10001 || { echo "is $(id)"; exit 1; }
        for tool in cc gcc g++ make; do ! command -v $tool || exit 1; done
        ! touch /opt/slsnet/x /tmp/x 2>/dev/null || { echo "can write"; exit 1; }
        ! find /opt /etc/passwd -perm /go+w -not -type l | grep . || exit 1
        grep -q "^CapEff:.*0000000000000000$" /proc/self/status || { echo "has capabilities"; exit 1; }
        ' || fail "the container is not as locked up as it should be"
    [ "$(engine image inspect "$image" \
        --format '{{index .Config.Labels "org.opencontainers.image.revision"}}')" = "$revision" ] ||
        fail "its label names another revision than $revision"
    engine run --rm "${hardened[@]}" --network none -v "$root:/source:ro" --entrypoint python \
        "$image" /source/docker/test/client.py bill || fail "the bill of materials"
    local cores='from server.cores import available_cores; print(available_cores())'
    cores=$(engine run --rm "${hardened[@]}" --network none --cpus 1 --entrypoint python "$image" \
        -c "$cores")
    [ "$cores" = 1 ] || fail "with --cpus 1 the server counts $cores cores"
}

serve() {
    local started
    started=$(now_ms)
    start -e SLSNET_DRAIN_GRACE_S=5
    try "the server was not healthy within a minute" healthy
    say "healthy $(($(now_ms) - started)) ms after the command, its own check included"
    ask segment "$url" "$photo" "$truth" || fail "segmentation"
}

serve_without_a_network() {
    engine run -d --name "$server" "${hardened[@]}" --network none "$image" >/dev/null
    try "the server was not healthy without a network" healthy
    engine stop --time 30 "$server" >/dev/null
    end 0 "a server without a network"
    say "serves and drains without a network: it fetches nothing"
}

stop_under_load() {
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
    loading=
    end 0 "a drained server"
    say "SIGTERM under load: $(tail -1 "$output/load"); exit code 0"
    engine rm "$client" >/dev/null
}

stop_while_it_starts() {
    local started took
    start
    started=$(now_ms)
    engine stop --time 30 "$server" >/dev/null
    took=$(($(now_ms) - started))
    [ $took -lt 15000 ] || fail "a stop during the start took $took ms"
    engine rm "$server" >/dev/null
    say "stopped during its start within $took ms"
}

start_to_ready() {
    local started
    for _ in 1 2 3; do
        started=$(now_ms)
        start
        try "not ready" ready
        say "ready $(($(now_ms) - started)) ms after the command"
        engine stop --time 30 "$server" >/dev/null
        end 0 "an idle server"
    done
}

build_and_measure
[ -z "$podman" ] || build_again # Docker's own builder needs an option that not every store takes
look_inside
serve
stop_under_load
serve_without_a_network
stop_while_it_starts
start_to_ready

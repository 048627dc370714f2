# Compose: server, Prometheus and, where its image can be had, Grafana, brought up as they are
# shipped; Prometheus is asked for the scrape, the alerts and every query of the dashboard, and
# locust loads the server. SCREENSHOT=FILE.png keeps Prometheus' own pages under that load.
# shellcheck shell=bash disable=SC2154

prometheus=http://127.0.0.1:$((port + 1))
grafana=http://127.0.0.1:$((port + 2))
services=(server prometheus)
reference=trt_build/reference/lesion_000.jpg

# Small limits, so that a few clients can do all that the dashboard shows.
printf '%s\n' SLSNET_MAX_QUEUE=24 SLSNET_HEAD_TIMEOUT_S=2 SLSNET_LOG_FORMAT=text >"$output/server.env"
export SLSNET_IMAGE=$image SLSNET_ENV_FILE=$output/server.env \
    LOAD_IMAGE=localhost/slsnet-load:test LOAD_USERS=4 LOAD_TIME=30s \
    SLSNET_PUBLISH=127.0.0.1:$port PROMETHEUS_PUBLISH=${prometheus#http://} \
    GRAFANA_PUBLISH=${grafana#http://}

stack() { compose --project-name slsnet-test --file docker/compose.yaml "$@"; }
take_down() {
    local code=0
    stack --profile load down --volumes || code=$?
    [ -n "${KEEP:-}" ] || engine rmi -f "$LOAD_IMAGE" || code=$?
    return $code
}
ask_stack() { "$(tools)/python" docker/test/stack.py "$@"; }

# The public images are the ones that are served. Where no registry can be reached Prometheus is
# Debian's, laid out as the public image is, and Grafana is left out: Debian has none.
if [ -n "$podman" ] && [ -z "${PROMETHEUS_IMAGE:-}" ]; then
    export PROMETHEUS_IMAGE=localhost/slsnet-prometheus:trixie
    if ! engine image exists "$PROMETHEUS_IMAGE"; then
        say "Prometheus' image, from Debian's package"
        printf '%s\n' "FROM $PYTHON_IMAGE" \
            'RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus' \
            'RUN mkdir -p /prometheus && chown 65534:65534 /prometheus' \
            'WORKDIR /prometheus' 'ENTRYPOINT ["/usr/bin/prometheus"]' >"$output/Dockerfile"
        quietly "$output/prometheus.log" buildah bud --quiet --isolation chroot --format docker \
            --file "$output/Dockerfile" --tag "$PROMETHEUS_IMAGE" "$output"
    fi
    [ -z "${GRAFANA_IMAGE:-}" ] || services+=(grafana)
else
    services+=(grafana)
fi

need_image
tools >/dev/null
at_exit+=(take_down)
quietly "$output/up.log" stack up --detach "${services[@]}"
ask_stack scraped "$prometheus" || fail "the scrape"
[ "$(stack exec -T server printenv SLSNET_LOG_FORMAT 2>/dev/null)" = text ] ||
    fail "server.env does not win over compose.env"
in_prometheus() { stack exec -T prometheus promtool "$@" 2>&1 | grep -v '^[0-9a-f ]*$'; }
in_prometheus check config /etc/prometheus/prometheus.yml || fail "promtool"
in_prometheus test rules /etc/prometheus/alerts_test.yml || fail "the alerts' own tests"
ask_stack rules "$prometheus" || fail "the alerts"
ask_stack dashboard "$prometheus" "$url" "$reference" || fail "the dashboard"
ask_stack alert "$prometheus" SlsnetShedding pending firing || fail "no alert"
if [[ " ${services[*]} " = *" grafana "* ]]; then
    ask_stack grafana "$grafana" || fail "Grafana"
else
    say "no image of Grafana here: its dashboard's queries were asked of Prometheus itself"
fi

engine image inspect "$LOAD_IMAGE" >/dev/null 2>&1 ||
    quietly "$output/load.log" build "$LOAD_IMAGE" docker/Dockerfile.load
[ -z "${SCREENSHOT:-}" ] || LOAD_TIME=120s
stack --profile load run --rm -T load >"$output/locust.log" 2>&1 &
loading=$!
if [ -n "${SCREENSHOT:-}" ]; then
    sleep 110
    ask_stack screenshot "$prometheus" "$SCREENSHOT" || fail "the screenshot"
fi
wait $loading || { tail -30 "$output/locust.log" >&2; fail "locust found a wrong mask or an error"; }
loading=
say "locust: $(grep -m 1 Aggregated "$output/locust.log")"

# As a crash loop does it. Each start has to be scraped, or it does not count.
for start in 1 2 3; do
    quietly "$output/restart.log" stack restart server
    ask_stack starts "$prometheus" $start || fail "a start is not counted"
done
ask_stack annotation "$prometheus" Starts || fail "a start is not marked"
ask_stack alert "$prometheus" SlsnetRestarting firing || fail "no alert"
quietly "$output/stop.log" stack stop server
ask_stack alert "$prometheus" SlsnetDown firing || fail "no alert"
ask_stack annotation "$prometheus" Alerts || fail "an alert is not marked"
quietly "$output/down.log" take_down

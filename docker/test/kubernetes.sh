# Kubernetes' manifests: rendered, held against the schemas, and the pod of the CPU overlay run.
# shellcheck shell=bash disable=SC2154

reference=trt_build/reference/lesion_000.jpg
bin=$(tools)
render() { "$bin/kubectl" kustomize "docker/kubernetes/overlays/$1"; }
manifests() { "$bin/python" docker/test/manifests.py "$@"; }

for overlay in cpu gpu; do
    render $overlay >"$output/$overlay.yaml" || fail "kustomize, $overlay"
    manifests validate <"$output/$overlay.yaml" || fail "the schemas, $overlay"
done

play_pod() {
    local pod container
    manifests play "$image" "$port" <"$output/cpu.yaml" >"$output/pod.yaml"
    quietly "$output/play.log" engine kube play "$output/pod.yaml"
    pod=$(engine pod ps --filter name=slsnet --format '{{.Name}}')
    container=$(engine ps --pod --filter "pod=$pod" --format '{{.Names}}' | grep server)
    try "the pod is not ready" curl --silent --fail --output /dev/null "$url/health/ready"
    say "the pod $pod is ready; its settings: $(engine exec "$container" env | grep ^SLSNET_ |
        sort | tr '\n' ' ')"
    curl --silent --fail --data-binary "@$reference" --header 'Content-Type: image/jpeg' \
        "$url/segment?format=json&mask=rle" | grep -q '"found":true' || fail "segmentation"
    [ "$(engine exec "$container" id -u)" = 10001 ] || fail "the pod is not of its user"
    ! engine exec "$container" touch /opt/slsnet/x 2>/dev/null || fail "the pod can write"
    engine stop --time 75 "$container" >/dev/null
    [ "$(engine wait "$container")" = 0 ] || fail "the pod did not drain"
    say "segmented, is locked up, and drained with 0"
}

stop_playing() { engine kube down "$output/pod.yaml"; }
if [ -n "$podman" ]; then
    need_image
    at_exit+=(stop_playing)
    play_pod
    stop_playing >/dev/null
else
    say "no podman: the pod is not run"
fi

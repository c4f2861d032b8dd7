#!/usr/bin/env bash
# Everything that needs a card, in one call: builds in place for it, runs the CUDA tests, watches a
# small set under compute-sanitizer, runs the CUDA benchmarks.
#
#   bash bench/gpu.sh [--quick]
#
# Needs torch with CUDA, nvcc, pytest, ninja, pybind11, rich and matplotlib; no network, no virtual
# environment. Writes bench/results/<card>.json, .md and .png, also to $OUT where that is set.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

python=${PYTHON:-python3}
quick=() limit=530 bench_limit=200
if [[ ${1:-} == --quick ]]; then
    quick=(--quick) limit=175 bench_limit=45
fi
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
checks=$work/checks
: >"$checks"
failed=0

record() { printf '%s\t%s\n' "$1" "$2" | tee -a "$checks"; }
# Seconds left for a step when those after it keep what they need.
left() { local s=$((limit - SECONDS - $1)); echo $((s > 10 ? s : 10)); }
# Runs a command for at most $1 seconds, shows its output and keeps it in $work/log.
step() {
    local most=$1
    shift
    timeout --kill-after=5 "$most" "$@" 2>&1 | tee "$work/log"
    return "${PIPESTATUS[0]}"
}
reason() { [[ $1 == 124 || $1 == 137 ]] && echo "ran out of time" || echo "failed with status $1"; }

# 9.0a holds what only Hopper has (wgmma, bulk copies).
card=$("$python" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + "a" * (major == 9))') || {
    echo "gpu.sh: torch sees no CUDA device here" >&2
    exit 2
}
arch=${TORCH_CUDA_ARCH_LIST:-$card}

echo "== build for $arch"
start=$SECONDS
LINFUSE_CUDA=1 TORCH_CUDA_ARCH_LIST=$arch step "$(left $((bench_limit + 30)))" \
    "$python" setup.py build_ext --inplace
status=$?
if ((status)); then
    record build "$(reason $status)"
    [[ -n ${OUT:-} ]] && cp "$work/log" "$OUT/build.log"
    exit 1
fi
record build "ok for $arch in $((SECONDS - start)) s"

echo "== CUDA tests"
step "$(left $((bench_limit + 60)))" "$python" -m pytest -q -m cuda tests
status=$?
summary=$(grep -E '[0-9]+ (passed|failed|error|skipped|deselected)' "$work/log" | tail -n 1)
case $status in
    0) record "tests -m cuda" "$summary" ;;
    5) record "tests -m cuda" "none found" ;;
    *) failed=1 && record "tests -m cuda" "$(reason $status): $summary" ;;
esac

for tool in memcheck racecheck; do
    echo "== compute-sanitizer $tool"
    if ! command -v compute-sanitizer >/dev/null; then
        record "$tool" "not run: no compute-sanitizer here"
        continue
    fi
    # without torch's own cache every tensor is its own allocation, so that each bound is checked
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$(left $((bench_limit + 20)))" \
        compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
        "$python" -m bench.sanitize "${quick[@]}"
    status=$?
    if grep -q 'Device not supported' "$work/log"; then
        record "$tool" "not run: compute-sanitizer says 'Device not supported' on this machine"
    elif ((status == 0)); then
        record "$tool" "$(grep -E 'SUMMARY' "$work/log" | tail -n 1 | sed 's/^=* *//')"
    else
        failed=1
        record "$tool" "$(reason $status): $(grep -E '=====|rror' "$work/log" | head -n 3 | tr '\n' ' ')"
        [[ -n ${OUT:-} ]] && cp "$work/log" "$OUT/$tool.log"
    fi
done

echo "== benchmarks"
# the last case may start just before the time is up, and the picture takes a moment
step "$(left 0)" "$python" -m bench.gpu "${quick[@]}" --checks "$checks" --seconds "$(left 40)"
status=$?
((status)) && failed=1 && record benchmarks "$(reason $status)"
echo "gpu.sh: $([[ $failed == 0 ]] && echo ok || echo "something failed, see above") after $SECONDS s"
exit $failed

#!/usr/bin/env bash
# Everything that needs a card, in one call: builds in place for it, runs the CUDA tests, watches a
# small set under compute-sanitizer, runs the CUDA benchmarks.
#
#   bash bench/gpu.sh [--quick]     9 minutes at most; 3, of parts of it, without racecheck
#
# Needs torch with CUDA, nvcc, pytest, setuptools >= 77, ninja, pybind11, rich and matplotlib, and for
# all of the tests numpy, scipy, safetensors and hypothesis; no network, no virtual environment. Writes bench/results/<card>.json, .md and .png, and where $OUT is
# set these and every step's output there. Without git, LINFUSE_COMMIT names the commit.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

python=${PYTHON:-python3}
limit=530
# The most seconds that each step may take. The benchmarks have what is left, `bench` at least.
declare -A most=([build]=240 [tests]=140 [memcheck]=60 [racecheck]=60)
bench=150
quick=() some=()
if [[ ${1:-} == --quick ]]; then
    limit=175
    most=([build]=100 [tests]=45 [memcheck]=40)
    bench=45
    quick=(--quick)
    some=(-k "captured or (equals_the and (float32 or bfloat16))")
fi
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

[[ -n ${OUT:-} ]] && mkdir -p "$OUT"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
checks=$work/checks
: >"$checks"
failed=0

record() { printf '%s\t%s\n' "$1" "$2" | tee -a "$checks"; }
# Seconds that are left, less $1.
left() { local s=$((limit - SECONDS - $1)) && echo $((s > 10 ? s : 10)); }
# Runs the step $1, shows its output and keeps it in $work/log. What runs out of time is interrupted,
# so that it can say how far it came.
step() {
    local name=$1 time
    shift
    echo "== $name"
    if [[ -n ${most[$name]:-} ]]; then
        time=$(left "$bench")
        ((most[$name] < time)) && time=${most[$name]}
    else
        time=$(left 0)
    fi
    timeout --signal=INT --kill-after=5 "$time" "$@" 2>&1 | tee "$work/log"
    local status=${PIPESTATUS[0]}
    [[ -n ${OUT:-} ]] && cp "$work/log" "$OUT/$name.log"
    return "$status"
}
reason() { [[ $1 == 124 || $1 == 137 ]] && echo "ran out of time" || echo "failed with status $1"; }

# 9.0a holds what only Hopper has (wgmma, bulk copies).
card=$(timeout 60 "$python" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + "a" * (major == 9))') || {
    echo "gpu.sh: torch sees no CUDA device here" >&2
    exit 2
}

start=$SECONDS
LINFUSE_CUDA=1 TORCH_CUDA_ARCH_LIST=$card step build "$python" setup.py build_ext --inplace
status=$?
if ((status)); then
    record build "$(reason $status)"
    exit 1
fi
record build "ok for $card in $((SECONDS - start)) s"

# Most of a test's time is the host's: several share the card.
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 8)
OMP_NUM_THREADS=1 step tests "$python" -m pytest -q -m cuda --tb=short --maxfail=25 \
    --continue-on-collection-errors "${parallel[@]}" "${some[@]}" tests
status=$?
summary=$(grep -E '[0-9]+ (passed|failed|error|skipped|deselected)' "$work/log" | tail -n 1)
case $status in
    0) record "tests -m cuda" "$summary" ;;
    5) record "tests -m cuda" "none found" ;;
    *) failed=1 && record "tests -m cuda" "$(reason $status): $summary" ;;
esac

# Our own kernels alone are watched: torch's take long, and its libraries try calls that fail.
# Without torch's cache every tensor is its own allocation, so that each bound is checked.
watched=(--report-api-errors no --launch-timeout 0)
help=$(compute-sanitizer --help 2>&1)
filter=$(grep -oE -e '--kernel-(name|regex)\b' <<<"$help" | sort -u | head -n 1)
[[ -n $filter ]] && watched+=("$filter" kns=linfuse)
for tool in memcheck racecheck; do
    [[ -n ${most[$tool]:-} ]] || continue
    if ! command -v compute-sanitizer >/dev/null; then
        record "$tool" "not run: no compute-sanitizer here"
        continue
    fi
    # Less would do for torch to be imported, and no more.
    if (($(left "$bench") < 25)); then
        record "$tool" "not run: no time was left"
        continue
    fi
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" \
        compute-sanitizer --tool "$tool" "${watched[@]}" --error-exitcode 9 \
        --target-processes all "$python" -m bench.sanitize "${quick[@]}"
    status=$?
    if grep -q 'Device not supported' "$work/log"; then
        record "$tool" "not run: compute-sanitizer says 'Device not supported' on this machine"
    elif ((status == 0)); then
        record "$tool" "$(grep -E 'SUMMARY' "$work/log" | tail -n 1 | sed 's/^=* *//')"
    else
        failed=1
        record "$tool" "$(reason $status): $(grep -E '=====|rror' "$work/log" | head -n 3 | tr '\n' ' ')"
    fi
done

# The last case may start just before the time is up, and the picture takes a moment.
step benchmarks "$python" -m bench.gpu "${quick[@]}" --checks "$checks" --seconds "$(left 40)"
status=$?
((status)) && failed=1 && record benchmarks "$(reason $status)"
echo "gpu.sh: $([[ $failed == 0 ]] && echo ok || echo "something failed, see above") after $SECONDS s"
exit $failed

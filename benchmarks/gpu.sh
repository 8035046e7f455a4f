#!/usr/bin/env bash
# The proof with a GPU, in one command and under 9 minutes: build, tests on the device, kernels, end to end. Needs Python
# with torch, triton, transformers, pybind11 and cmake, and nvcc; no network.
#
#     bash benchmarks/gpu.sh [FOLDER] [DATA]          # default: .gpu-results, and ../shared/data, else .gpu-data
#     DEVICE=cpu QUICK=1 bash benchmarks/gpu.sh /tmp/r # the same commands with tiny shapes, on any machine
#
# Each part has a time limit of its own, and what is left of LIMIT seconds is all that the last may take. A part that
# fails loses no other. FOLDER holds CSV, JSON, PNG and a log for each part; summary.txt says what passed, and what was
# reached of the numbers to reach. If OUT is set, summary and a bundle of all go there after each part.
# pack_gpu_data.sh makes .gpu-data. Exit status: 0, or 1 if a part failed.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.gpu-results} device=${DEVICE:-cuda} python=${PYTHON:-python3} limit=${LIMIT:-530}
data=${2:-${PSYKERN_DATA:-../shared/data}}
[ -d "$data" ] || data=.gpu-data
quick=()
[ -z "${QUICK:-}" ] || quick=(--quick)
mkdir -p "$folder"
folder=$(realpath "$folder")
rm -f "$folder"/{status.tsv,quick,*.json}
[ -z "${QUICK:-}" ] || touch "$folder/quick" # no number of such a run counts
started=$SECONDS failed=0
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true
export OMP_WAIT_POLICY=PASSIVE

part() { # NAME SECONDS COMMAND…
    local name=$1 most=$2 left=$((limit - (SECONDS - started))) begin=$SECONDS status=0
    shift 2
    ((most < left)) || most=$left
    if ((most < 5)); then
        status=124
        echo "no time was left" >"$folder/$name.log"
    else
        echo "== $name (at most $most s)"
        timeout --kill-after=5 "$most" "$@" >"$folder/$name.log" 2>&1 || status=$?
        tail -n 3 "$folder/$name.log" | cut -c1-300
    fi
    ((status == 0)) || failed=1
    printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - begin))" >>"$folder/status.tsv"
    "$python" benchmarks/gpu_summary.py "$folder" >"$folder/summary.txt" 2>&1 || true
    [ -z "${OUT:-}" ] || { cp "$folder/summary.txt" "$OUT/" && tar -czf "$OUT/gpu-results.tar.gz" -C "$folder" .; }
}

wheels() { # of other libraries to compare with, where they were packed
    compgen -G "$PWD/.gpu-data/wheels/*.whl" >/dev/null || return 0
    "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$folder/site" \
        .gpu-data/wheels/*.whl && export PYTHONPATH="$PYTHONPATH:$folder/site"
}

bench() { # NAME SECONDS SCRIPT ARGUMENTS…
    local name=$1 most=$2 script=$3
    shift 3
    part "$name" "$most" "$python" "benchmarks/bench_$script.py" --device "$device" --name "$name" \
        --folder "$folder" ${quick[@]+"${quick[@]}"} "$@"
}

score() { # SHAPE SECONDS
    bench "score_${1,,}" "$2" score --shape "$1" --data "$data" --mix "${MIX:-gpu}" --repeats "${REPEATS:-2}" \
        --providers study careful psykern:streamed psykern
}

[ -n "${SKIP_BUILD:-}" ] || part build 90 "$python" setup.py --quiet build_ext --inplace
[ "$device" = cpu ] || wheels || echo "wheels: not installed"
mark=gpu
[ "$device" != cpu ] || mark="not gpu"
tests=tests
[ "$device" != cpu ] || tests=tests/test_gpu.py
parallel=()
[ "$device" = cpu ] || ! "$python" -c "import xdist" 2>/dev/null || parallel=(-n 4)
part tests 140 "$python" -m pytest -q -m "$mark" -p no:cacheprovider ${parallel[@]+"${parallel[@]}"} "$tests"
bench option_logprobs_gpu 70 option_logprobs
bench prefix_attention_gpu 80 prefix_attention
score Qwen3-8B 130
score Qwen3-0.6B 60
score Llama-3.2-1B 60
bench elementwise_gpu 40 elementwise
rm -rf "$folder/site"
cat "$folder/summary.txt"
exit $failed

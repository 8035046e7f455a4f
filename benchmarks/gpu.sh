#!/usr/bin/env bash
# The proof with a GPU, for one that is lent in three calls of at most ten minutes: CALL=1 builds, checks, tests and scores;
# CALL=2 tunes and profiles; CALL=3 measures the winners again, and others beside them. Needs Python with torch, triton,
# transformers, pybind11 and cmake, and nvcc; no network.
#
#     CALL=1 bash benchmarks/gpu.sh [FOLDER] [DATA]   # default: .gpu-results, and ../shared/data, else .gpu-data; all calls
#     DEVICE=cpu QUICK=1 bash benchmarks/gpu.sh /tmp/r # the same commands with tiny shapes, on any machine
#
# What matters most comes first. Each part has a time limit of its own, and what is left of LIMIT seconds is all that
# the last may take; one that is cut is interrupted, and keeps what it has written. A part that fails loses no other.
# FOLDER holds CSV, JSON, PNG and a log for each part, and what nvidia-smi saw of clocks and power meanwhile; summary.txt
# says what passed, and what was reached of the numbers to reach. If OUT is set, summary and a bundle of all go there after
# each part. pack_gpu_data.sh makes .gpu-data. PARTS names the parts to run, if not all of the call; PYTHON, MIX (of
# transcripts), REPEATS (end to end) and SKIP_BUILD are for trials. Exit status: 0, or 1 if a part failed.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.gpu-results} device=${DEVICE:-cuda} python=${PYTHON:-python3} limit=${LIMIT:-530}
data=${2:-${PSYKERN_DATA:-../shared/data}}
[ -d "$data" ] || data=.gpu-data
quick=() mix=${MIX:-gpu}
[ -z "${QUICK:-}" ] || quick=(--quick) mix=${MIX:-small}
mkdir -p "$folder"
folder=$(realpath "$folder")
rm -f "$folder"/{status.tsv,quick,*.json}
[ -z "${QUICK:-}" ] || touch "$folder/quick" # no number of such a run counts
started=$SECONDS failed=0
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true
export OMP_WAIT_POLICY=PASSIVE
[ ! -d /usr/local/cuda/bin ] || export PATH="$PATH:/usr/local/cuda/bin" # nvcc, compute-sanitizer
command -v make >/dev/null || export CMAKE_GENERATOR=Ninja
free=$(df --output=avail -B1G /dev/shm 2>/dev/null | tail -n 1) # GiB
((${free:-0} <= 24)) || export TMPDIR=/dev/shm                  # for checkpoints: 16 GB at 8B

part() { # NAME SECONDS COMMAND…
    local name=$1 most=$2 left=$((limit - (SECONDS - started))) begin=$SECONDS status=0
    shift 2
    [[ -z "${PARTS:-}" || " $PARTS " == *" $name "* ]] || return 0
    ((most < left)) || most=$left
    if ((most < 5)); then
        status=124
        echo "no time was left" >"$folder/$name.log"
    else
        echo "== $name (at most $most s)"
        timeout --signal=INT --kill-after=10 "$most" "$@" >"$folder/$name.log" 2>&1 || status=$?
        tail -n 3 "$folder/$name.log" | cut -c1-300
    fi
    ((status == 0)) || failed=1
    printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - begin))" >>"$folder/status.tsv"
    "$python" benchmarks/gpu_summary.py "$folder" >"$folder/summary.txt" 2>&1 || true
    [ -z "${OUT:-}" ] ||
        { cp "$folder/summary.txt" "$OUT/" && tar -czf "$OUT/gpu-results.tar.gz" --exclude=./site -C "$folder" .; }
}

wheels() { # of setuptools and of other libraries to compare with, where they were packed
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
    bench "score_${1,,}" "$2" score --shape "$1" --data "$data" --mix "$mix" --repeats "${REPEATS:-2}" \
        --providers ${PROVIDERS:-psykern study careful psykern:streamed}
}

pytest() { # NAME SECONDS ARGUMENTS…
    local name=$1 most=$2
    shift 2
    part "$name" "$most" env OMP_NUM_THREADS=1 "$python" -m pytest -q -p no:cacheprovider \
        --maxfail=20 -rfE --durations=15 --junitxml="$folder/$name.xml" "$@"
}

first() { # is it right, how fast is the machine, how fast is a run
    [ -n "${SKIP_BUILD:-}" ] || part build 90 "$python" setup.py --quiet build_ext --inplace
    part smoke 80 env CUDA_LAUNCH_BLOCKING=1 "$python" benchmarks/gpu_smoke.py --device "$device" --name smoke \
        --folder "$folder" ${quick[@]+"${quick[@]}"}
    if [ "$device" = cpu ]; then
        pytest tests_engine 140 -m "not gpu" tests/engine/test_gpu.py
    else # apart, as those of the kernels make launches blocking
        pytest tests_kernels 80 -m gpu -n 14 \
            tests/kernels/test_{contract,dispatch,elementwise,experts,option_logprobs,prefix_attention}.py
        pytest tests_engine 60 -m gpu -k "not sanitizer" -n 12 tests/engine/test_gpu.py
    fi
    bench gpu_rates 100 gpu_rates --seconds "${SECONDS_EACH:-0.8}"
    score Qwen3-8B 170
    score Qwen3-0.6B 90
}

second() { # alternatives to the tables of attention's blocks, on a real wave, and of experts' tiles; then end to end
    [ -n "${SKIP_BUILD:-}" ] || part build 90 "$python" setup.py --quiet build_ext --inplace
    part tune 150 "$python" benchmarks/tune.py --device "$device" --ops prefix_attention --cases wave --name tune \
        --folder "$folder" ${quick[@]+"${quick[@]}"}
    part tune_experts 90 "$python" benchmarks/tune.py --device "$device" --ops experts --name tune_experts \
        --folder "$folder" ${quick[@]+"${quick[@]}"}
    bench run_gpu 90 run --data "$data"
}

third() { # the winners, others beside them
    [ -n "${SKIP_BUILD:-}" ] || part build 90 "$python" setup.py --quiet build_ext --inplace
    score Qwen3-8B 170
    score Qwen3-0.6B 90
    bench option_logprobs_gpu 70 option_logprobs
    bench prefix_attention_gpu 80 prefix_attention
    score Llama-3.2-1B 50
    bench elementwise_gpu 40 elementwise
    pytest sanitizer 120 -n 2 -m gpu -k sanitizer tests/engine/test_gpu.py
}

[ "$device" = cpu ] || wheels || echo "wheels: not installed"
if [ "$device" != cpu ] && command -v nvidia-smi >/dev/null; then
    nvidia-smi >"$folder/nvidia-smi.txt" 2>&1
    nvidia-smi dmon -s pucm -o T >"$folder/clocks.txt" 2>&1 & # power, load, clocks, memory: a line a second
    trap "kill $! 2>/dev/null" EXIT
fi
case "${CALL:-all}" in
1) first ;;
2) second ;;
3) third ;;
all) first; second; third ;;
*) echo "CALL: expected 1, 2, 3 or nothing, got $CALL" >&2 && exit 2 ;;
esac
rm -rf "$folder/site"
cat "$folder/summary.txt"
exit $failed

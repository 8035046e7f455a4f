#!/usr/bin/env bash
# Runs both passes of `make test` with what chooses the kernels of numpy (OpenBLAS), torch and MKL, and with one thread
# and two, and prints a row for each. No test may rest on such a choice. A kernel that the processor lacks cannot be
# chosen: run this on a new one. What pytest said is in build/matrix.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
LOGS=build/matrix
SETTINGS=(
    THREADS=1
    THREADS=2
    OPENBLAS_CORETYPE=Haswell
    OPENBLAS_CORETYPE=SkylakeX
    OPENBLAS_CORETYPE=Zen
    ATEN_CPU_CAPABILITY=default
    ATEN_CPU_CAPABILITY=avx2
    MKL_ENABLE_INSTRUCTIONS=AVX2
)
mkdir -p "$LOGS"
unset OPENBLAS_CORETYPE ATEN_CPU_CAPABILITY MKL_ENABLE_INSTRUCTIONS
export OMP_WAIT_POLICY=PASSIVE
status=0
echo "| setting | pass | result |"
echo "|---|---|---|"
for setting in "${SETTINGS[@]}"; do
    for pass in interpret plain; do
        log="$LOGS/$setting-$pass.log"
        env "$setting" make "$pass" OLDER= >"$log" 2>&1 || status=1
        result=$(grep -E '(passed|failed|error).* in [0-9.]+s' "$log" | tail -n 1 | tr -d '=')
        echo "| \`$setting\` | $pass | ${result:-$(tail -n 1 "$log")} |"  # or what ended it before pytest did
    done
done
exit $status

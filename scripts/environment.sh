# Functions for the other scripts: find a Python, create `.venv`, install kdbench into it. Sets ROOT (the checkout) and
# changes into it. A function that fails prints a message and exits.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT" || exit 1
VENV="$ROOT/.venv"

say() { printf '%s\n' "$*"; }

fail() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 1
}

# Prints the path of the first interpreter of version 3.10 or newer; PYTHON=... comes first.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      command -v "$candidate"
      return 0
    fi
  done
  return 1
}

make_venv() {
  if [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    return 0
  fi
  local python
  python="$(find_python)" || fail "no Python 3.10 or newer found; install one, or set its path: PYTHON=/path/to/python $0"
  say "Creating .venv with $("$python" --version)"
  "$python" -m venv "$VENV" ||
    fail "$python cannot create a virtual environment (on Debian and Ubuntu: apt install python3-venv)."
}

# install [EXTRA]: installs kdbench in editable mode, unless pyproject.toml is unchanged since the last installation.
install() {
  local extra="${1:-}" requirement stamp start
  requirement=".${extra:+[$extra]}"
  stamp="$VENV/installed${extra:+-$extra}"
  if [ -f "$stamp" ] && cmp -s pyproject.toml "$stamp"; then
    return 0
  fi
  start=$SECONDS
  say "Installing kdbench${extra:+ with the extra '$extra'} into .venv (the first time fetches PyTorch: several minutes) ..."
  "$VENV/bin/python" -m pip install -qq --disable-pip-version-check --editable "$requirement" ||
    fail "the installation failed (errors above)."
  cp pyproject.toml "$stamp"
  say "Installed in $((SECONDS - start)) s."
}

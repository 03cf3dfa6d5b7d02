#!/usr/bin/env bash
# Makes .venv, ready to use, and prints nothing else than progress.
#
# The heavy part (torch, ray, ...: about 6 GB) is installed once per Python version, constraints and extras, in
#   ${PATCHWORK_ENV_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/patchwork}/env-<hash>
# under a lock, and counts only when its marker file `complete` exists. A clone's own .venv is light: it reads the
# cached packages through a .pth file and holds this project, editable.
#
# usage: infra/env.sh [extra]        extra: dev (default), local, worker, server
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:-dev}
python=${PYTHON:-python3}
say() { printf '\033[1m[env]\033[0m %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

command -v "$python" >/dev/null || fail "$python not found: install Python 3.11 or newer, or set PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$("$python" --version) is too old: 3.11 or newer is needed (set PYTHON=...)"
"$python" -c 'import ensurepip, venv' 2>/dev/null || fail "this Python cannot make environments: install python3-venv"
command -v flock >/dev/null || fail "flock not found: install util-linux"

# What to install: the base dependencies and those of the extra, its references to other extras followed.
requirements() {
  "$python" - "$extra" <<'PY'
import re, sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras, found = project["optional-dependencies"], list(project["dependencies"])
def add(extra):
    for line in extras[extra]:
        inner = re.match(re.escape(project["name"]) + r"\[(.*)\]", line)
        if inner:
            for name in inner[1].split(","):
                add(name)
        else:
            found.append(line)
add(sys.argv[1])
print("\n".join(sorted(set(found))))
PY
}

wanted=$(requirements)
hash=$({ "$python" -c 'import platform, sys; print(sys.version, platform.machine())'; cat constraints.txt; echo "$wanted"; } | sha256sum | cut -c1-16)
cache=${PATCHWORK_ENV_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/patchwork}
env=$cache/env-$hash
mkdir -p "$cache"

build_cached_env() {
  local start=$SECONDS
  say "installing $(wc -l <<<"$wanted") packages and what they need into $env (about 6 GB; once per constraints file)"
  rm -rf "$env"
  "$python" -m venv "$env"
  "$env/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^pip==' constraints.txt)"
  "$env/bin/python" -m pip install --disable-pip-version-check --prefer-binary --no-warn-script-location \
    --constraint constraints.txt --requirement <(echo "$wanted") >&2
  touch "$env/complete"
  say "done in $((SECONDS - start)) s"
}

exec 9>"$env.lock"
if ! flock --nonblock 9; then
  say "another process is installing $env: waiting for it"
  flock 9
fi
[ -e "$env/complete" ] || build_cached_env
flock --unlock 9

# The clone's own environment, made again when the cached one or pyproject.toml changed.
stamp="$env $(sha256sum <pyproject.toml)"
if [ "$(cat .venv/patchwork-stamp 2>/dev/null)" != "$stamp" ] || ! .venv/bin/python -c 'import configs' 2>/dev/null; then
  rm -rf .venv
  "$env/bin/python" -m venv --without-pip .venv
  packages=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  own=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  echo "import site; site.addsitedir('$packages')" >"$own/patchwork_cached_env.pth"
  "$env/bin/python" -m pip --python .venv/bin/python install --quiet --disable-pip-version-check \
    --no-index --no-deps --no-build-isolation --editable .
  echo "$stamp" >.venv/patchwork-stamp
  say ".venv is ready ($packages)"
fi

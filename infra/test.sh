#!/usr/bin/env bash
# The tests: those that are named, as pytest takes them, or all. Of all, the ones that start real stacks (tests/stack) mostly
# wait for processes, so they run beside the rest; the fault tests, which hold the time that things take, run alone after them.
#
#   infra/test.sh PYTHON [pytest arguments]
set -uo pipefail
cd "$(dirname "$0")/.."

python=$1
shift
if [ $# -gt 0 ]; then
    exec "$python" -m pytest "$@"
fi

log=$(mktemp)
beside=
# pytest ends what its tests have started; nothing of it stays behind when this is interrupted.
trap 'status=$?; [ -z "$beside" ] || { kill -INT "$beside" 2>/dev/null; wait "$beside"; }; rm -f "$log"; exit $status' EXIT
trap 'exit 130' INT TERM

set -m # a group of its own: Ctrl-C reaches it once, by the trap
"$python" -m pytest -p no:cacheprovider tests/stack >"$log" 2>&1 &
beside=$!
set +m
"$python" -m pytest tests --ignore=tests/stack --ignore=tests/faults
rest=$?
echo "== tests/stack, which ran beside these"
wait "$beside"
stack=$?
beside=
cat "$log"
"$python" -m pytest -p no:cacheprovider tests/faults
faults=$?
[ $((rest + stack + faults)) -eq 0 ]

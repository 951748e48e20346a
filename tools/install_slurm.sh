#!/usr/bin/env bash
# Debian's SLURM for tools/slurm_sandbox.sh: only as root, only what is missing, and no service is started.
#
#   tools/install_slurm.sh      one line says what was done; exit code 0 also where nothing can be done: the tests that need it skip
#                               (.ci/run fails then where it is root)
#
# Where systemd runs, the packages would start munged, slurmctld and slurmd: a policy-rc.d forbids it for as long as this takes. A
# machine that has a policy-rc.d of its own keeps it.
set -euo pipefail

PACKAGES="munge slurmctld slurmd slurm-client"
POLICY=${POLICY_RC_D:-/usr/sbin/policy-rc.d}
LOG=$(mktemp)
PATH=$PATH:/usr/sbin:/sbin

leave() { # why the tests will skip, or what is there
  echo "slurm: $*"
  rm -f "$LOG"
  exit 0
}

missing=""
for command in munged slurmctld slurmd sbatch; do
  command -v "$command" >/dev/null || missing+=" $command"
done
[[ -n $missing ]] || leave "installed"
[[ $(id -u) == 0 ]] || leave "no$missing, and only root can install: the tests on a real SLURM will skip"
command -v apt-get >/dev/null || leave "no$missing, and no apt-get: the tests on a real SLURM will skip"

if [[ ! -e $POLICY ]]; then
  trap 'rm -f "$POLICY"' EXIT
  printf '#!/bin/sh\nexit 101\n' >"$POLICY"
  chmod 755 "$POLICY"
fi
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086
if { apt-get update && apt-get install -y --no-install-recommends $PACKAGES; } >"$LOG" 2>&1 </dev/null; then
  leave "installed $PACKAGES"
fi
tail -n 3 "$LOG" >&2
leave "no$missing, and apt-get failed (no network?): the tests on a real SLURM will skip"

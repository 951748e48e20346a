#!/bin/bash
# Submits the jobs of tiny-slurm, each after the one before it has ended well. `mcore-longctx launch --submit` does the same.
# Call it in the folder in which launch was called.
set -eo pipefail

RUN=runs/tiny-slurm
[[ -f $RUN/recipe.yaml ]] || { echo "no $RUN/recipe.yaml in $PWD: call this in the folder in which launch was called" >&2; exit 2; }
mkdir -p "$RUN/slurm"

# The lock of `launch`: the jobs of two submissions at once would not know of each other.
command -v flock >/dev/null || { echo "no flock on PATH (util-linux): use mcore-longctx launch --submit" >&2; exit 2; }
LOCK=$RUN/slurm/.lock
exec 9>>"$LOCK"
flock -n 9 || {
    echo "another launch works on this folder ($(<"$LOCK")): nothing was submitted" >&2
    exit 2
}
echo -n "process $$ on $(uname -n)" >"$LOCK"

# `id name` of each job, as soon as sbatch has taken it: `launch` reads and writes the same file.
JOBS=$RUN/slurm/jobs.txt
if [[ -s $JOBS ]]; then
    queued=$(squeue --noheader --me --format="%A %T") || {
        echo "squeue does not answer, and the jobs of $JOBS may be in the queue: nothing was submitted" >&2
        exit 2
    }
    while read -r id name || [[ -n $id ]]; do
        if [[ $'\n'$queued == *$'\n'"$id "* ]]; then
            echo "already submitted: $name (job $id): wait for it, or scancel $id; nothing was submitted" >&2
            exit 2
        fi
    done <"$JOBS"
fi
: >"$JOBS"

submitted=()
undo() { # all or none
    trap - ERR INT TERM HUP
    if [[ ${#submitted[@]} == 0 ]] || scancel "${submitted[@]}"; then
        : >"$JOBS"
        echo "nothing of the chain is left in the queue" >&2
    else
        echo "scancel failed: still in the queue may be ${submitted[*]}" >&2
    fi
    exit 1
}
trap undo ERR INT TERM HUP
previous=""
for job in 00-prepare 20-extend 90-finish; do
    id=$(sbatch --parsable --kill-on-invalid-dep=yes ${previous:+"--dependency=afterok:$previous"} "$RUN/slurm/$job.sbatch" 9>&-)
    previous=${id%%;*}
    submitted+=("$previous")
    echo "$previous $job" | tee -a "$JOBS"
done

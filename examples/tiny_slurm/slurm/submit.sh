#!/bin/bash
# Submits the jobs of tiny-slurm, each after the one before it has ended well. `mcore-longctx launch --submit` does the same,
# and writes down the job ids. Call it in the folder in which launch was called.
set -eo pipefail

RUN=runs/tiny-slurm
[[ -f $RUN/recipe.yaml ]] || { echo "no $RUN/recipe.yaml in $PWD: call this in the folder in which launch was called" >&2; exit 2; }
mkdir -p "$RUN/slurm"

submitted=()
trap '[[ ${#submitted[@]} == 0 ]] || scancel "${submitted[@]}"' ERR  # all or none
previous=""
for job in 00-prepare 20-extend 90-finish; do
    id=$(sbatch --parsable --kill-on-invalid-dep=yes ${previous:+"--dependency=afterok:$previous"} "$RUN/slurm/$job.sbatch")
    previous=${id%%;*}
    submitted+=("$previous")
    echo "$previous $job"
done

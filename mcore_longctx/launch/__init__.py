"""Starting processes: torchrun on one machine, srun inside a SLURM allocation. `doctor` looks at the machine."""

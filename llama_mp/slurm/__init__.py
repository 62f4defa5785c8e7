"""Jobs of SLURM: what is submitted, what runs inside of it, and what is told of it."""

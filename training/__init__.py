"""Parts of a training run outside the model and the loop: checkpoints, processes, run folders."""

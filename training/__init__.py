"""What a run of train.py consists of, but for the model: checkpoints, processes, its folder."""

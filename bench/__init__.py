"""What it costs: each figure beside its peer in the same run, per CPU-second."""

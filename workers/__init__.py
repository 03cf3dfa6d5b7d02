"""What runs on the cluster for one attempt: driver, worker group, training loop, engine, data, checkpoints."""

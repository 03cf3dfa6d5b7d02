"""What the API does, without HTTP: submit, steer, ingest reports, read history. Routes call these and nothing else."""

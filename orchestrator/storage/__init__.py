"""What outlives every process: the database's tables and migrations, the object store, the registry of checkpoints."""

"""The control plane: API, queue, scheduler, reconciler, launcher, registry, command line and client."""

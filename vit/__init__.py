"""The science of Patchwork: models, losses, optimizer groups, schedules and weight formats. PyTorch only."""

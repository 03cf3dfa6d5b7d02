"""A job in this process: the same attempt, loop and checkpoints as on a cluster, without server, Ray and object store.

Found by the command line through the entry point `patchwork.commands`, since it needs torch.
"""

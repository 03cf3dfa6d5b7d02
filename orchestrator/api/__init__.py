"""Routes: each one parses, calls one service and names its public model."""

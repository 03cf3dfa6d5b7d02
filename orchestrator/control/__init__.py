"""What moves jobs: transitions, leases, scheduling, decisions, the reconciler, and the launcher that speaks to Ray."""

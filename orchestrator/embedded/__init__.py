"""The embedded parts: object store, Ray head, API and controller started and watched on one machine.

Nothing here imports ray or torch: every part is a child process.
"""

"""A search on the cluster: its driver, the samplers and rules that choose, and the processes of its trials."""

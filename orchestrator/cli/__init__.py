"""The command line. Commands that need a server speak to it through `orchestrator.client`; planning needs none."""

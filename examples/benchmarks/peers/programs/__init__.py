"""What a measured process runs, a file for each system: `python -m peers.programs.NAME` in its own environment."""

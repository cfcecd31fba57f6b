"""The `ts-parallel` command. Each file is one sub-command."""

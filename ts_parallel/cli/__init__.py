"""The `ts-parallel` command: `main` finds its sub-commands, each a file. Knows options and terminals."""

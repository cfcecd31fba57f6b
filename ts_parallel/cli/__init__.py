"""The `ts-parallel` command. Each file is one sub-command, or what several of them share."""

ARCHIVE_VERSION = "1.0"
"""Of every archive that is written, and so a part of its model's URL."""

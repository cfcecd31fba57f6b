"""The backend of the package's kernels for CPUs. Knows addresses and layouts; where none fits, it is torch's."""

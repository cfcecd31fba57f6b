"""A GPU's own way to compute: Triton kernels, products of several linears at once, steps of a few fixed sizes."""

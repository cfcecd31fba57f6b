"""Kernels in Triton. They know addresses, strides and sizes; tensors are their callers' business."""

"""Batch inference: tasks, micro-batches, greedy answers of encoder-decoders. Knows items and tensors; no transport."""

"""Micro-batches through a rank's stages. Knows tensors and shapes; nothing of items, texts or what they mean."""

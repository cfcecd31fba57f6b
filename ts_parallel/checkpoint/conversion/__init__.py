"""A checkpoint in another format, for other programs. Knows tensors as bytes in pieces and files; no model, no rank."""

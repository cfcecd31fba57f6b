"""Texts and pairs of texts: how they become tokens, and which embeddings, scores, labels and entities come of it."""

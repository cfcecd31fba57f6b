"""One rank at work: a step plan in, token ids out. Knows tensors and KV memory, nothing of clients or texts."""

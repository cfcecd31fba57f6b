"""How this machine computes what stages ask for; chosen once, by `choose`. Knows tensors, step plans; no request."""

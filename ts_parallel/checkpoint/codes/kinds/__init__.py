"""How weights are quantised, a file a format: which stored tensors make up a weight, and how its numbers come of
them."""

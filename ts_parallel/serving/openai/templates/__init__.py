"""A model's chat template: what it makes of messages, and how much of time and memory it may take for that."""

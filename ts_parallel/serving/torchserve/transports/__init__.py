"""What carries replies to TorchServe: round trips of continuous batching, or the messages of a batch. Knows no answer."""

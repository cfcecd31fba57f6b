"""What carries replies to TorchServe: round trips of continuous batching, or messages of a batch. Knows no answer."""

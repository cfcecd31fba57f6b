"""HTTP bodies in, engine requests through, texts out; and TorchServe's own protocol around it."""

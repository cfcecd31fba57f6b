"""GGUF files: their header, blocks of codes, names of tensors, and the configuration and tokenizer inside."""

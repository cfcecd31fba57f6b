"""The backend of torch's own functions: works anywhere, gives float32 the bits of transformers. Knows no kernel."""

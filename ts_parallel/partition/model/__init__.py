"""The unmodified model: built without memory, its attention found, called. Knows transformers; nothing of ranks."""

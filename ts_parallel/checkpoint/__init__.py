"""What a checkpoint folder holds and how its bytes reach memory. Knows names, shapes and byte ranges, no models."""

"""Tokens to text and back, forms, stop strings, what a folder says of them. Knows the tokenizer; no request."""

"""What a client may ask about the model and its server: names, limits, and a description of all routes."""

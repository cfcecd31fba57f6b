"""The commands that talk to a server that runs already, anybody's. Knows HTTP and OpenAI's bodies; loads no model."""

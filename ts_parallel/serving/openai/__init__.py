"""The routes of a model that generates: bodies, answers, choices. Knows OpenAI's shapes, the engine; no transport."""

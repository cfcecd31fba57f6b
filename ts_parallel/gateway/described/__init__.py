"""What bodies may have, as tables that check them, and `GET /openapi.json`, which is made of those."""

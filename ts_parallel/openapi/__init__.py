"""Descriptions of routes in OpenAPI 3.1."""

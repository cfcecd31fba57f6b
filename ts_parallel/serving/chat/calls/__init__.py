"""Readers of what stands between the markers of a tool call, one for each way in which families write it."""

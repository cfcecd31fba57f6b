"""HTTP with bare `/v1` before one or several models of TorchServe. Knows shapes and bytes; no engine and no torch."""

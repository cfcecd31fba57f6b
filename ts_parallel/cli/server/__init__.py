"""The commands that archive a model and start TorchServe. Knows archives and processes; runs no model itself."""

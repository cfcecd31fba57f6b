"""How a gateway asks TorchServe: connections, answers piece by piece, which models there are and which answer."""

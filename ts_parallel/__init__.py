"""Tensor-parallel serving of unmodified Hugging Face models behind TorchServe."""

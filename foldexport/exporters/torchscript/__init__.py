"""TorchScript archives, run by torch.jit."""

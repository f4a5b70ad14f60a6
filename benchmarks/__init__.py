"""Speed against plain PyTorch and its peers. Nothing in ``cmx_kernels`` imports this package."""

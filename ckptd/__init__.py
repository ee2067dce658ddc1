"""ckptd: checkpointing and fault tolerance for distributed PyTorch training. This package is the daemon and the CLI."""

__version__ = "0.1.0"

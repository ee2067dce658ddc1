"""ckptd in the training process: ``Checkpointer`` captures state lazily and hands it to the daemon on the node."""

import os

# grpcio with its fork support on hangs a DataLoader's forked workers while RPC threads are busy; off, it works quietly.
# It is read when grpc is first imported, so it must be set before anything else is imported here.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from ckptd_client.checkpointer import Checkpointer
from ckptd_client.snapshot import Restored, Snapshot
from ckptd_client.timing import Watch, watch
from ckptd_client.zarr import open_zarr

__all__ = ["Checkpointer", "Restored", "Snapshot", "Watch", "open_zarr", "watch"]

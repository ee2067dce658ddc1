"""The state of every random number generator that training code reaches without naming it.

Python's ``random``, NumPy's global generator, torch's CPU generator and that of every visible CUDA device. Bit-exact;
none of them touches a device's memory or waits for it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def capture_rng() -> dict[str, Any]:
    """A value for ``encode_tree``. Devices are included once CUDA is initialised: before that nothing was drawn."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state().numpy(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = [rng.numpy() for rng in torch.cuda.get_rng_state_all()]
    return state


def restore_rng(value: Mapping[str, Any]) -> None:
    """Put back what ``capture_rng`` took. Devices that this process does not have are left out."""
    random.setstate(value["python"])
    np.random.set_state(value["numpy"])
    torch.set_rng_state(torch.from_numpy(value["torch"].copy()))
    for device, rng in enumerate(value.get("cuda", ())):
        if device < torch.cuda.device_count():
            torch.cuda.set_rng_state(torch.from_numpy(rng.copy()), device)

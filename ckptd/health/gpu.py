"""Reads NVIDIA's GPUs through NVML, where ``nvidia-ml-py`` is installed and a driver runs. Layer: ``health``, a reader.

NVML holds no CUDA context. Invariants: every call is tolerated by itself: what one GPU or driver does not offer is
absent and told in ``unread``; a GPU that has fallen off the bus is told as such, and the others are read.
"""

from __future__ import annotations

import errno
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from ckptd.detect.health import name_of

_BUSY_PERCENT: Final = 90
# nvmlReturn_t: GPU_IS_LOST, RESET_REQUIRED
_LOST: Final = frozenset({15, 16})
# nvmlClocksEventReasons: software thermal, hardware thermal. A power cap is how a GPU under load lives.
_THERMAL: Final = 0x20 | 0x40
# Fields of NVML: replays, recoveries and CRC errors of one link (Hopper tells these), and over all links (older GPUs).
_NVLINK_ERRORS: Final = (161, 162, 163)
_NVLINK_ERRORS_OF_ALL: Final = (38, 45, 52, 59)


@dataclass(frozen=True, slots=True)
class _Gpu:
    address: str
    handle: Any


class GpuSource:
    """By PCI address. Temperature and clock are told of a busy GPU only: an idle one is cold and slow by design."""

    name = "gpus"

    def __init__(self) -> None:
        self.unread: dict[str, str] = {}
        self._nvml: Any = None
        self._gpus: list[_Gpu] = []

    def read(self) -> dict[str, float]:
        if self._nvml is None:
            self._open()
        values: dict[str, float] = {}
        for gpu in self._gpus:
            values.update(self._read(gpu))
        return values

    def close(self) -> None:
        if self._nvml is not None:
            nvml, self._nvml = self._nvml, None
            nvml.nvmlShutdown()

    def _open(self) -> None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError as error:
            raise OSError(errno.ENOENT, "nvidia-ml-py is not installed") from error
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            raise OSError(errno.ENODEV, f"NVML: {error}") from error
        self._nvml = nvml
        try:
            handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
            self._gpus = [_Gpu(_address(nvml.nvmlDeviceGetPciInfo(handle).busId), handle) for handle in handles]
        except nvml.NVMLError as error:
            self.close()
            raise OSError(errno.ENODEV, f"NVML: {error}") from error
        if not self._gpus:
            self.close()
            raise OSError(errno.ENODEV, "NVML: no GPU")

    def _read(self, gpu: _Gpu) -> dict[str, float]:
        nvml, handle = self._nvml, gpu.handle
        calls: dict[str, Callable[[], float]] = {
            "gpu_thermal_throttle": lambda: bool(self._throttle_reasons(handle) & _THERMAL),
            "gpu_ecc_uncorrected_total": lambda: nvml.nvmlDeviceGetTotalEccErrors(
                handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            ),
            "gpu_pcie_replays_total": lambda: nvml.nvmlDeviceGetPcieReplayCounter(handle),
            "gpu_nvlink_errors_total": lambda: self._nvlink_errors(handle),
            "gpu_busy_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            "gpu_temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "gpu_clock_hz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM) * 1e6,
        }
        values = {"gpu_lost": 0.0}
        for family, call in calls.items():
            try:
                values[family] = float(call())
                self.unread.pop(family, None)
            except nvml.NVMLError as error:
                if error.value in _LOST:
                    return {name_of("gpu_lost", gpu.address): 1.0}
                self.unread[family] = f"GPU {gpu.address}: {error}"
        if values.pop("gpu_busy_percent", 0.0) < _BUSY_PERCENT:
            values.pop("gpu_temperature_c", None)
            values.pop("gpu_clock_hz", None)
        return {name_of(family, gpu.address): value for family, value in values.items()}

    def _throttle_reasons(self, handle: Any) -> int:
        try:
            return int(self._nvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
        except self._nvml.NVMLError_FunctionNotFound:  # the name in drivers before 535
            return int(self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))

    def _nvlink_errors(self, handle: Any) -> float:
        """Errors of all links; NVMLError when not one kind of them is counted."""
        links = range(self._nvml.NVML_NVLINK_MAX_LINKS)
        for fields in ([(field, link) for link in links for field in _NVLINK_ERRORS], list(_NVLINK_ERRORS_OF_ALL)):
            answers = self._nvml.nvmlDeviceGetFieldValues(handle, fields)
            counted = [int(answer.value.ullVal) for answer in answers if answer.nvmlReturn == 0]
            if counted:
                return float(sum(counted))
        raise self._nvml.NVMLError(answers[0].nvmlReturn)


def _address(bus_id: str | bytes) -> str:
    """As the kernel log writes it: "00000000:3B:00.0" is "0000:3b:00"."""
    text = bus_id.decode() if isinstance(bus_id, bytes) else bus_id
    domain, bus, device = text.lower().split(":")
    return f"{domain[-4:]}:{bus}:{device.partition('.')[0]}"

"""GPUs through NVML: each call tolerated by itself, a lost GPU told, an idle one not taken for a slow one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from ckptd.health.gpu import GpuSource

NOT_SUPPORTED, FUNCTION_NOT_FOUND, GPU_IS_LOST, DRIVER_NOT_LOADED = 3, 13, 15, 9


class NvmlError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"error {value}")
        self.value = value


class FunctionNotFound(NvmlError):
    pass


def fail(value: int) -> Callable[..., object]:
    def call(*arguments: object) -> object:
        raise (FunctionNotFound if value == FUNCTION_NOT_FOUND else NvmlError)(value)

    return call


class FakeNvml(SimpleNamespace):
    """NVML of a node with GPUs that are busy and well; tests replace calls."""

    NVMLError = NvmlError
    NVMLError_FunctionNotFound = FunctionNotFound
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0
    NVML_TEMPERATURE_GPU = 0
    NVML_CLOCK_SM = 1
    NVML_NVLINK_MAX_LINKS = 4

    def __init__(self, count: int = 1) -> None:
        self.opened = 0
        super().__init__(
            nvmlInit=lambda: self.count(1),
            nvmlShutdown=lambda: self.count(-1),
            nvmlDeviceGetCount=lambda: count,
            nvmlDeviceGetHandleByIndex=lambda index: index,
            nvmlDeviceGetPciInfo=lambda gpu: SimpleNamespace(busId=f"00000000:{0x3B + gpu:02X}:00.0"),
            nvmlDeviceGetCurrentClocksEventReasons=lambda gpu: 0x4,
            nvmlDeviceGetTotalEccErrors=lambda gpu, kind, counter: 2,
            nvmlDeviceGetPcieReplayCounter=lambda gpu: 5,
            nvmlDeviceGetFieldValues=lambda gpu, fields: [field_value(*link_errors(field)) for field in fields],
            nvmlDeviceGetUtilizationRates=lambda gpu: SimpleNamespace(gpu=97),
            nvmlDeviceGetTemperature=lambda gpu, sensor: 64,
            nvmlDeviceGetClockInfo=lambda gpu, clock: 1755,
        )

    def count(self, change: int) -> None:
        self.opened += change


def field_value(value: int, status: int) -> SimpleNamespace:
    return SimpleNamespace(nvmlReturn=status, value=SimpleNamespace(ullVal=value))


def link_errors(field: tuple[int, int] | int) -> tuple[int, int]:
    """Value and status: of two links, each by itself; nothing is told of all together."""
    if isinstance(field, int) or field[1] > 1:
        return 77, NOT_SUPPORTED
    kind, link = field
    return {161: 1 + link, 162: 0, 163: 3}[kind], 0


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


def test_a_busy_gpu_is_told_by_the_address_that_the_kernel_log_uses(nvml: FakeNvml) -> None:
    source = GpuSource()
    assert source.read() == {
        "gpu_lost{0000:3b:00}": 0.0,
        "gpu_thermal_throttle{0000:3b:00}": 0.0,
        "gpu_ecc_uncorrected_total{0000:3b:00}": 2.0,
        "gpu_pcie_replays_total{0000:3b:00}": 5.0,
        "gpu_nvlink_errors_total{0000:3b:00}": 9.0,
        "gpu_temperature_c{0000:3b:00}": 64.0,
        "gpu_clock_hz{0000:3b:00}": 1755e6,
    }
    assert source.unread == {}
    source.close()
    source.close()
    assert nvml.opened == 0


def test_an_idle_gpu_is_neither_cold_nor_slow(nvml: FakeNvml) -> None:
    nvml.nvmlDeviceGetUtilizationRates = lambda gpu: SimpleNamespace(gpu=40)
    values = GpuSource().read()
    assert not {"gpu_temperature_c{0000:3b:00}", "gpu_clock_hz{0000:3b:00}"} & values.keys()


@pytest.mark.parametrize(("reasons", "throttles"), [(0x4, 0.0), (0x1, 0.0), (0x20, 1.0), (0x48, 1.0), (0x80, 0.0)])
def test_heat_is_throttling_and_a_power_cap_is_not(nvml: FakeNvml, reasons: int, throttles: float) -> None:
    nvml.nvmlDeviceGetCurrentClocksEventReasons = lambda gpu: reasons
    assert GpuSource().read()["gpu_thermal_throttle{0000:3b:00}"] == throttles


def test_drivers_that_know_the_older_name_of_the_reasons_are_read(nvml: FakeNvml) -> None:
    nvml.nvmlDeviceGetCurrentClocksEventReasons = fail(FUNCTION_NOT_FOUND)
    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = lambda gpu: 0x40
    assert GpuSource().read()["gpu_thermal_throttle{0000:3b:00}"] == 1.0


@pytest.mark.parametrize(
    ("call", "family"),
    [
        ("nvmlDeviceGetTotalEccErrors", "gpu_ecc_uncorrected_total"),
        ("nvmlDeviceGetPcieReplayCounter", "gpu_pcie_replays_total"),
        ("nvmlDeviceGetFieldValues", "gpu_nvlink_errors_total"),
        ("nvmlDeviceGetTemperature", "gpu_temperature_c"),
    ],
)
def test_what_a_gpu_does_not_offer_is_absent_and_said_and_all_else_is_read(
    nvml: FakeNvml, call: str, family: str
) -> None:
    whole = GpuSource().read()
    works = getattr(nvml, call)
    setattr(nvml, call, fail(NOT_SUPPORTED))
    source = GpuSource()
    values = source.read()
    assert whole.keys() - values.keys() == {f"{family}{{0000:3b:00}}"}
    assert source.unread == {family: "GPU 0000:3b:00: error 3"}
    setattr(nvml, call, works)
    assert source.read() == whole
    assert source.unread == {}


def test_links_of_older_gpus_are_read_all_together(nvml: FakeNvml) -> None:
    nvml.nvmlDeviceGetFieldValues = lambda gpu, fields: [
        field_value(field if isinstance(field, int) else 0, 0 if field == 52 else NOT_SUPPORTED) for field in fields
    ]
    assert GpuSource().read()["gpu_nvlink_errors_total{0000:3b:00}"] == 52.0


def test_links_that_count_no_error_of_any_kind_are_said_not_zero(nvml: FakeNvml) -> None:
    nvml.nvmlDeviceGetFieldValues = lambda gpu, fields: [field_value(9, NOT_SUPPORTED) for _ in fields]
    source = GpuSource()
    assert "gpu_nvlink_errors_total{0000:3b:00}" not in source.read()
    assert source.unread["gpu_nvlink_errors_total"].endswith("error 3")


def test_a_lost_gpu_is_told_and_the_others_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(count=2)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)

    def temperature(gpu: int, sensor: int) -> int:
        if gpu == 1:
            raise NvmlError(GPU_IS_LOST)
        return 64

    nvml.nvmlDeviceGetTemperature = temperature
    values = GpuSource().read()
    assert values["gpu_lost{0000:3b:00}"] == 0.0
    assert values["gpu_temperature_c{0000:3b:00}"] == 64.0
    assert {name: value for name, value in values.items() if "3c" in name} == {"gpu_lost{0000:3c:00}": 1.0}


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        ("nvmlInit", fail(DRIVER_NOT_LOADED)),
        ("nvmlDeviceGetCount", fail(DRIVER_NOT_LOADED)),
        ("nvmlDeviceGetCount", lambda: 0),
    ],
)
def test_no_driver_and_no_gpu_are_said_and_nothing_stays_open(
    nvml: FakeNvml, call: str, answer: Callable[..., object]
) -> None:
    setattr(nvml, call, answer)
    with pytest.raises(OSError, match="NVML"):
        GpuSource().read()
    assert nvml.opened == 0


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(OSError, match="nvidia-ml-py is not installed"):
        GpuSource().read()

"""An NVIDIA GPU: see :class:`headrace.cuda.device.Device`. One stream, everything in order."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.cuda import bindings
from headrace.cuda.compile import Specialisation, cubins
from headrace.cuda.context import OLDEST_ARCH, CUDAContext, arch, device_name
from headrace.cuda.device import Counters, DeviceArray, Event, Graph, Launch
from headrace.errors import DeviceError, DeviceMemoryError
from headrace.stages import stage


def _check(result: tuple[Any, ...], operation: str) -> Any:
    """The value of a driver call, or a DeviceError that names the operation and the cause."""
    status, *values = result
    driver = bindings.driver()
    if status == driver.CUresult.CUDA_SUCCESS:
        return values[0] if len(values) == 1 else tuple(values)
    _, text = driver.cuGetErrorString(status)
    cause = text.decode() if text else str(status)
    kind = DeviceMemoryError if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY else DeviceError
    raise kind(f"{operation}: {cause} ({status.name})")


class CUDAGraph:
    def __init__(self, device: CUDADevice, executable: Any) -> None:
        self._device, self._executable = device, executable

    def launch(self) -> None:
        self._device.counters.graph_launches += 1
        driver = self._device.driver
        _check(driver.cuGraphLaunch(self._executable, self._device.stream), "graph launch")

    def close(self) -> None:
        if self._executable is not None:
            _check(self._device.driver.cuGraphExecDestroy(self._executable), "graph destroy")
            self._executable = None


class CUDAEvent:
    def __init__(self, device: CUDADevice) -> None:
        self._device = device
        kinds = device.driver.CUevent_flags
        # The thread that waits sleeps: others need the core.
        flags = kinds.CU_EVENT_DISABLE_TIMING.value | kinds.CU_EVENT_BLOCKING_SYNC.value
        self._event = _check(device.driver.cuEventCreate(flags), "event")

    def record(self) -> None:
        _check(self._device.driver.cuEventRecord(self._event, self._device.stream), "event")

    def wait(self) -> None:
        _check(self._device.driver.cuEventSynchronize(self._event), "waiting for a copy")

    def close(self) -> None:
        _check(self._device.driver.cuEventDestroy(self._event), "event")


class CUDADevice:
    """GPU ``index`` of those CUDA_VISIBLE_DEVICES shows."""

    def __init__(self, index: int = 0) -> None:
        self.driver = driver = bindings.driver()
        self._context: CUDAContext | None
        self._context = context = CUDAContext(index)
        try:
            self._look_up(context.device)
            _check(driver.cuCtxSetCurrent(context.handle), "context")
            # 1: apart from the default stream
            self.stream = _check(driver.cuStreamCreate(1), "stream")
        except BaseException:
            context.close()
            raise
        self.counters = Counters()
        self._functions: dict[Specialisation, Any] = {}
        self._modules: list[Any] = []
        self._prepared: dict[int, tuple[Launch, Any, Any, list[Any]]] = {}
        self._pinned: dict[int, int] = {}

    def _look_up(self, device: int) -> None:
        driver = self.driver

        def get(name: str) -> int:
            key = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
            return int(_check(driver.cuDeviceGetAttribute(key, device), name))

        self.arch = arch(device)
        self.sm_count = get("MULTIPROCESSOR_COUNT")
        self.shared_limit = get("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        self._name = device_name(device)
        if self.arch < OLDEST_ARCH:
            raise DeviceError(
                f"{self._name} has compute capability {self.arch / 10}, and the kernels need "
                f"{OLDEST_ARCH / 10} (Turing) or later: use --device cpu"
            )
        # NVRTC's name of the architecture; Hopper's own instructions need the suffix.
        self.target = "90a" if self.arch == 90 else str(self.arch)

    @property
    def name(self) -> str:
        return self._name

    def free_bytes(self) -> int:
        free, _ = _check(self.driver.cuMemGetInfo(), "memory information")
        return int(free)

    def allocate(self, n_bytes: int, purpose: str) -> int:
        status, pointer = self.driver.cuMemAlloc(n_bytes)
        if status == self.driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise DeviceMemoryError(
                f"{purpose}: {n_bytes:,} bytes wanted on {self.name}, {self.free_bytes():,} free: "
                "use a smaller model, a shorter context or fewer sequences"
            )
        return int(_check((status, pointer), f"allocating {n_bytes:,} bytes for {purpose}"))

    def free(self, address: int) -> None:
        if address in self._pinned:
            del self._pinned[address]
            _check(self.driver.cuMemFreeHost(address), "free")
        else:
            _check(self.driver.cuMemFree(address), "free")

    def allocate_pinned(self, n_bytes: int) -> tuple[int, NDArray[np.uint8]]:
        address = int(_check(self.driver.cuMemAllocHost(n_bytes), f"pinning {n_bytes:,} bytes"))
        self._pinned[address] = n_bytes
        view = np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(address))
        view[:] = 0
        return address, view  # one address space: the device uses the host's address

    def upload(self, address: int, data: NDArray[Any]) -> None:
        flat = np.ascontiguousarray(data)
        self.counters.bytes_to_device += flat.nbytes
        # From pageable memory the driver copies before it returns.
        _check(
            self.driver.cuMemcpyHtoDAsync(address, flat.ctypes.data, flat.nbytes, self.stream),
            f"copying {flat.nbytes:,} bytes to the device",
        )

    def upload_pinned(self, address: int, pinned: NDArray[np.uint8]) -> None:
        self.counters.bytes_to_device += pinned.nbytes
        _check(
            self.driver.cuMemcpyHtoDAsync(address, pinned.ctypes.data, pinned.nbytes, self.stream),
            f"copying {pinned.nbytes:,} bytes to the device",
        )

    def event(self) -> Event:
        return CUDAEvent(self)

    def download(self, array: DeviceArray) -> NDArray[Any]:
        out = np.empty(array.shape, array.dtype)
        self.counters.bytes_to_host += out.nbytes
        _check(
            self.driver.cuMemcpyDtoHAsync(out.ctypes.data, array.address, out.nbytes, self.stream),
            f"copying {out.nbytes:,} bytes to the host",
        )
        self.synchronise()
        return out

    def copy(self, target: int, source: int, n_bytes: int) -> None:
        _check(
            self.driver.cuMemcpyDtoDAsync(target, source, n_bytes, self.stream),
            f"copying {n_bytes:,} bytes on the device",
        )

    def clear(self, address: int, n_bytes: int) -> None:
        _check(
            self.driver.cuMemsetD8Async(address, 0, n_bytes, self.stream),
            f"clearing {n_bytes:,} bytes",
        )

    def prepare(self, specs: Iterable[Specialisation]) -> None:
        missing = [spec for spec in dict.fromkeys(specs) if spec not in self._functions]
        if missing:
            with stage(f"{len(missing)} kernels"):
                self._load(missing)

    def _load(self, missing: list[Specialisation]) -> None:
        driver = self.driver
        for spec, code in cubins(missing, self.target).items():
            module = _check(driver.cuModuleLoadData(code), f"loading {spec.name}")
            function = _check(driver.cuModuleGetFunction(module, spec.name.encode()), spec.name)
            limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver.cuFuncSetAttribute(function, limit, self.shared_limit), spec.name)
            self._modules.append(module)
            self._functions[spec] = function

    def launch(self, launch: Launch) -> None:
        prepared = self._prepared.get(id(launch))
        if prepared is None or prepared[0] is not launch:
            prepared = self._prepared[id(launch)] = self._prepare_launch(launch)
        _, function, config, keep = prepared
        self.counters.kernel_launches += 1
        result = self.driver.cuLaunchKernelEx(config, function, keep[0], 0)
        _check(result, f"launching {launch.spec.name} {launch.grid} x {launch.threads}")

    def _prepare_launch(self, launch: Launch) -> tuple[Launch, Any, Any, list[Any]]:
        driver = self.driver
        if launch.spec not in self._functions:
            self.prepare([launch.spec])
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.threads, 1, 1
        config.sharedMemBytes = launch.shared_bytes
        config.hStream = self.stream
        if self.arch >= 90:
            # The kernel may start before its predecessor ends; it waits for it itself.
            attribute = driver.CUlaunchAttribute()
            kinds = driver.CUlaunchAttributeID
            attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(launch.arguments))
        if len(self._prepared) > 1 << 16:
            self._prepared.clear()
        return launch, self._functions[launch.spec], config, [ctypes.addressof(pointers), pointers]

    def capture(self, record: Callable[[], None]) -> Graph:
        driver = self.driver
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        launches = self.counters.kernel_launches
        _check(driver.cuStreamBeginCapture(self.stream, mode), "capture")
        try:
            record()
        finally:
            graph = _check(driver.cuStreamEndCapture(self.stream), "capture")
            self.counters.kernel_launches = launches
        executable = _check(driver.cuGraphInstantiate(graph, 0), "graph")
        _check(driver.cuGraphDestroy(graph), "graph")
        _check(driver.cuGraphUpload(executable, self.stream), "graph upload")
        return CUDAGraph(self, executable)

    def idle(self) -> bool:
        status = self.driver.cuStreamQuery(self.stream)
        if status[0] == self.driver.CUresult.CUDA_ERROR_NOT_READY:
            return False
        _check(status, "the work queued before")
        return True

    def synchronise(self) -> None:
        self.counters.synchronisations += 1
        _check(self.driver.cuStreamSynchronize(self.stream), "waiting for the device")

    def elapsed(self, work: Callable[[], None]) -> float:
        """Seconds between the start and the end of what ``work`` queues, by device events."""
        driver = self.driver
        events = [_check(driver.cuEventCreate(0), "event") for _ in range(2)]
        _check(driver.cuEventRecord(events[0], self.stream), "event")
        work()
        _check(driver.cuEventRecord(events[1], self.stream), "event")
        self.synchronise()
        milliseconds = _check(driver.cuEventElapsedTime(*events), "event")
        for event in events:
            _check(driver.cuEventDestroy(event), "event")
        return float(milliseconds) / 1e3

    def close(self) -> None:
        if self._context is None:
            return
        self.synchronise()
        self._prepared.clear()
        for module in self._modules:
            _check(self.driver.cuModuleUnload(module), "unload")
        self._modules, self._functions = [], {}
        _check(self.driver.cuStreamDestroy(self.stream), "stream")
        self._context.close()
        self._context = None

"""The machine: device, backend, seeds. The only file that says `torch.cuda`.

megatron-core is written for CUDA. Where there is none, `prepare_for_megatron` lets the unmodified library run on CPU with gloo,
by the shims below. It must run before anything imports megatron; `mmar_megatron.config` and `mmar_megatron.parallel` see to that.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._device import _device_constructors

import mmar_megatron

HAS_CUDA = torch.cuda.is_available()
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Which ask a run to stop. Terminals, torchrun and schedulers send them to all processes of a run, its helpers included."""


_PR_SET_PDEATHSIG = 1


def device() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if HAS_CUDA else torch.device("cpu")


def device_name() -> str:
    """As the vendor calls it, for reports and the table of peak FLOPs."""
    return torch.cuda.get_device_name() if HAS_CUDA else "cpu"


def compute_capability() -> tuple[int, int] | None:
    """Of the GPU, such as (9, 0) of Hopper; None without one."""
    return torch.cuda.get_device_capability() if HAS_CUDA else None


def synchronize() -> None:
    """Wait for the device, so that a clock read afterwards is true."""
    if HAS_CUDA:
        torch.cuda.synchronize()


def mark() -> Any:
    """A point in the device's work. Costs nothing: the device is not waited for."""
    if not HAS_CUDA:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Between two marks, of which the device must have passed the second."""
    return start.elapsed_time(end) / 1000 if HAS_CUDA else end - start


def devices() -> tuple[str, ...]:
    """Names of this machine's devices that the process may use; none on CPU."""
    return tuple(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) if HAS_CUDA else ()


def device_memory(number: int) -> tuple[int, int]:
    """Bytes of a device's memory that are free, and all of them."""
    return torch.cuda.mem_get_info(number)


def device_versions() -> dict[str, str]:
    """Of the libraries below torch; empty on CPU."""
    if not HAS_CUDA:
        return {}
    return {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}


def reorders_launches(number: int) -> bool:
    """Whether kernels of a device may overtake each other, which undoes megatron-core's overlap under tensor parallelism.

    Before Blackwell (compute capability 10) they may, unless all go through one queue.
    """
    return torch.cuda.get_device_capability(number) < (10, 0) and os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") != "1"


def peak_memory_bytes() -> int | None:
    """Largest device memory in use so far; None on CPU."""
    return torch.cuda.max_memory_allocated() if HAS_CUDA else None


def versions() -> dict[str, str]:
    """Of this package and of what it computes with."""
    import megatron.core

    return {
        "mmar_megatron": mmar_megatron.__version__,
        "megatron_core": megatron.core.__version__,
        "torch": torch.__version__,
    }


def die_with_parent() -> None:
    """Have this process killed when the one that started it dies, however it dies: a helper is of no use then (Linux alone)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def launched() -> bool:
    """Whether a launcher (torchrun and its like) started this process."""
    return "RANK" in os.environ


def world_size() -> int:
    """Processes that the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Of this process among them."""
    return int(os.environ.get("RANK", 0))


def choose_device() -> None:
    """Work on this process's own of the machine's devices, by its rank on the machine."""
    if HAS_CUDA:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))


def init_process_group(*, timeout: timedelta) -> None:
    """Join the job's process group: NCCL on GPUs, else gloo. One process needs no launcher, and no port.

    Args:
        timeout: after which a collective of the whole job fails.
    """
    if torch.distributed.is_initialized():
        return
    alone: dict[str, Any] = {} if launched() else {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
    if HAS_CUDA:
        choose_device()
        torch.distributed.init_process_group(backend="nccl", device_id=device(), timeout=timeout, **alone)
    else:
        torch.distributed.init_process_group(backend="gloo", timeout=timeout, **alone)


def seed_everything(seed: int, *, tensor_rank: int) -> None:
    """Seed all generators alike on all ranks, but for megatron-core's own of model-parallel regions (for dropout there).

    Initial weights and training data draw from none of these: they are functions of the seed and a name or a sample.
    """
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, tp_rank=tensor_rank, ep_rank=0, etp_rank=tensor_rank, force_reset_rng=True)


def rng_state() -> dict[str, Any]:
    """All generators' states of this process, for checkpoints."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Undo of `rng_state`."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    get_cuda_rng_tracker().set_states(state["tracker"])


@functools.cache
def prepare_for_megatron() -> None:
    """Make `import megatron.core` work on this machine. Does nothing to torch where there is a GPU."""
    # megatron-core warns at import of each absent optional package, torch of its own deprecations: nobody can act on them.
    for message in (".*[Tt]ransformer [Ee]ngine.*", ".*[Aa]pex.*", ".*not installed.*", ".*deprecated.*"):
        warnings.filterwarnings("ignore", message=message, module=r"megatron\..*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|megatron)\..*")
    # Its distributed optimizer looks at gradients of the shards, which are views, and finds none, as it should.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf", category=UserWarning)
    if HAS_CUDA:
        return
    # On CPU compiling costs minutes and gains nothing.
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    _map_cuda_device_to_cpu()
    _import_without_compiler()
    _map_cuda_generators_to_cpu()


def _import_without_compiler() -> None:
    """megatron-core asks for its fused functions to be compiled as it is imported, which alone loads the compiler: a third of a
    process's start."""

    def not_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    with mock.patch.object(torch, "compile", not_compiled):
        importlib.import_module("megatron.core")


def _map_cuda_device_to_cpu() -> None:
    """megatron-core names the current CUDA device when it makes buffers, and waits for streams."""
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None

    # `with torch.device("meta")` knows the factories by identity: it must list the real ones before they are replaced.
    _device_constructors()

    def on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            wanted = kwargs.get("device")
            if wanted is not None and not isinstance(wanted, int) and torch.device(wanted).type == "cuda":
                kwargs["device"] = cpu
            return factory(*args, **kwargs)

        return wrapped

    # A TorchFunctionMode would be tidier but is not active inside backward and in other threads.
    names = ("empty", "zeros", "ones", "full", "rand", "randn")
    for name in ("tensor", "arange", "randint", *names, *(f"{name}_like" for name in names)):
        setattr(torch, name, on_cpu(getattr(torch, name)))

    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    original_type = torch.Tensor.type

    def type_as_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The gradient clipping of megatron-core compares the string that `tensor.type()` gives with "torch.cuda.FloatTensor".
        if args or kwargs:
            return original_type(self, *args, **kwargs)
        return original_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_as_on_cuda  # type: ignore[method-assign,assignment]


def _map_cuda_generators_to_cpu() -> None:
    """megatron-core forks CUDA generators for model-parallel regions and recomputation; here they are states of the CPU one."""
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)  # type: ignore[assignment]
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]

    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)

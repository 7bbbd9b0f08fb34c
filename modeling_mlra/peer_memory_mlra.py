"""Memory that the ranks of one node share for the decoding step's sums, or the reason why those go through NCCL.

All ranks of a group decide together, once, before anything is captured: a rank that cannot, or that was told not to,
keeps the others from it too.
"""

import contextlib
import logging
import os
import socket
import uuid
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import distributed

from .device_mlra import device_facts, on_device, triton_missing
from .step_exchange_mlra import MOST_RANKS, Exchange, inbox_shape

try:
    from torch.distributed import _symmetric_memory as symmetric_memory
except ImportError:
    symmetric_memory = None  # type: ignore[assignment]

ENVIRONMENT_VARIABLE = "MLRA_EXCHANGE"
WAYS = ("auto", "nccl")
PATIENCE = 600.0  # seconds to wait for another rank inside of a kernel, NCCL's own default
MOST_DEVICES = 64  # of a node
NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
logger = logging.getLogger(__name__)
_made: "weakref.WeakKeyDictionary" = weakref.WeakKeyDictionary()  # by group of ranks: all find the same in it
_exchanges: "weakref.WeakSet[Exchange]" = weakref.WeakSet()


def asked_exchange() -> str:
    """What the environment variable MLRA_EXCHANGE asks for: "auto", peer memory where it can be had, or "nccl".

    Raises:
        ValueError: for anything else.
    """
    asked = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if asked not in WAYS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={asked} is unknown; use one of {', '.join(WAYS)}")
    return asked


def exchange_of(mesh, numbers: int, device: torch.device) -> Exchange | None:
    """What sums up to `numbers` numbers over the ranks of a mesh, each of which calls this; None: NCCL does."""
    if device.type != "cuda":
        return None
    group, key = mesh.get_group(), (asked_exchange(), numbers)
    made = _made.setdefault(group, {})
    if key not in made:
        made[key] = shared_exchange(group, numbers, device)
    return made[key]


def shared_exchange(group, numbers: int, device: torch.device) -> Exchange | None:
    """The same, anew."""
    devices = agreed_devices(group, device, trouble_here(group, device))
    if devices is None or not agreed(group, device, unreachable(device, devices)):
        return None
    exchange, trouble = None, None
    try:
        exchange = allocate(group, numbers, device)
    except (RuntimeError, ImportError) as error:
        trouble = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if not agreed(group, device, trouble):
        return None
    assert exchange is not None
    _exchanges.add(exchange)
    return exchange


def trouble_here(group, device: torch.device) -> str | None:
    """What of this rank is in the way of peer memory, or None."""
    if asked_exchange() != "auto":
        return f"{ENVIRONMENT_VARIABLE}={asked_exchange()} asks for it"
    if symmetric_memory is None:
        return "this torch has no symmetric memory"
    if (trouble := triton_missing(device, torch.float32)) is not None:
        return trouble
    if not device_facts(device).nvidia:
        return "its kernel is for NVIDIA's GPUs"
    if distributed.get_world_size(group) > MOST_RANKS:
        return f"it is for up to {MOST_RANKS} ranks, not {distributed.get_world_size(group)}"
    return None


def unreachable(device: torch.device, devices: list[int]) -> str | None:
    """Which of the node's devices this one cannot reach, or None."""
    own = device.index or 0
    far = [other for other in devices if other != own and not torch.cuda.can_device_access_peer(own, other)]
    return f"GPU {own} has no access to the memory of GPU {far[0]}" if far else None


def node_number() -> int:
    """A number that processes of one node have in common."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    name = boot.read_text() if boot.is_file() else str(uuid.getnode())
    return zlib.crc32(f"{name} {socket.gethostname()}".encode())


def agreed_devices(group, device: torch.device, trouble: str | None) -> list[int] | None:
    """The devices of all ranks; None if a rank has some trouble, if ranks share a device, or nodes are several."""
    node, own = node_number(), min(device.index or 0, MOST_DEVICES - 1)
    told = torch.zeros(3 + MOST_DEVICES, dtype=torch.int64)
    told[:3] = torch.tensor([trouble is not None, node, -node])
    told[3 + own] = 1
    told = told.to(device)
    distributed.all_reduce(told, op=distributed.ReduceOp.MAX, group=group)
    refuses, most, least, *used = told.tolist()
    devices = [index for index, taken in enumerate(used) if taken]
    if trouble is None and refuses:
        trouble = "another rank cannot, or was told not to"
    elif trouble is None and most != -least:
        trouble = "the ranks are on several nodes"
    elif trouble is None and len(devices) < distributed.get_world_size(group):
        trouble = "ranks share a GPU, or each sees its own alone"
    return devices if _is_free(trouble) else None


def agreed(group, device: torch.device, trouble: str | None) -> bool:
    """Whether no rank has any trouble; all have come here then."""
    refuses = torch.tensor([trouble is not None], dtype=torch.int64, device=device)
    distributed.all_reduce(refuses, op=distributed.ReduceOp.MAX, group=group)
    if trouble is None and refuses.item():
        trouble = "another rank cannot"
    return _is_free(trouble)


def _is_free(trouble: str | None) -> bool:
    if trouble is not None:
        logger.info(f"sums of the decoding step go through NCCL, not through peer memory: {trouble}")
    return trouble is None


@contextlib.contextmanager
def _no_multicast() -> Iterator[None]:
    """Multicast objects, which torch would make beside the memory, are not used here, and some machines lack them."""
    before = os.environ.get(NO_MULTICAST)
    os.environ[NO_MULTICAST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[NO_MULTICAST]
        else:
            os.environ[NO_MULTICAST] = before


def allocate(group, numbers: int, device: torch.device) -> Exchange:
    """Memory of this rank that all others reach, and theirs; every rank of the group allocates the same.

    Raises:
        RuntimeError: where a device or its driver does not allow it.
    """
    ranks, rank = distributed.get_world_size(group), distributed.get_rank(group)
    shape = inbox_shape(numbers, ranks)
    with on_device(device), _no_multicast():
        inbox = symmetric_memory.empty(shape, dtype=torch.int64, device=device)
        handle = symmetric_memory.rendezvous(inbox, group)
        inbox.zero_()  # before the others, who wait for this rank's agreement, send anything
        inboxes = [inbox if r == rank else handle.get_buffer(r, shape, torch.int64) for r in range(ranks)]
        missing = torch.zeros(ranks, dtype=torch.int32, pin_memory=True)
    return Exchange(rank, inboxes, missing, int(PATIENCE * 1e9), held=handle)


@contextlib.contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """An error of the device, met inside, that a missing rank has caused names that rank.

    Raises:
        RuntimeError: one line, in place of the device's own.
    """
    try:
        yield
    except RuntimeError as error:
        for exchange in _exchanges:
            if ranks := exchange.missing():
                named, shape = " and ".join(f"rank {rank}" for rank in ranks), exchange.shape
                raise RuntimeError(
                    f"{named} of {shape.RANKS} sent no part of a sum within {shape.LIMIT / 1e9:g} s: dead, or far "
                    f"behind rank {shape.RANK}; start the job again"
                ) from error
        raise


__all__ = ["asked_exchange", "exchange_of", "naming_lost_ranks"]

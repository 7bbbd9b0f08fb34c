"""Runs the whole Hopper decode kernel as plain Python: every warpgroup a thread, on tensors of torch.

What the threads share behaves as on the device: barriers have phases of which a wait knows the parity alone; a copy
spoils its place at once and brings the bytes later, in any order; products are there when they have been waited for.
So a missing or mistaken wait gives NaN, or none ever ends one.
"""

import random
import threading
import types
from types import SimpleNamespace

import torch

from modeling_mlra import decode_copies_mlra, decode_hopper_mlra, decode_triton_mlra, decode_widening_mlra
from tests.gluon_in_python import LANGUAGE, Pointer

PATIENCE = 20  # seconds until a wait counts as one without end


class Barrier:
    """As in shared memory: a phase is over after `count` arrivals and all announced bytes."""

    changed = threading.Condition()
    given_up = False  # after a fault, by all

    def init(self, count):
        self.count = self.missing = count
        self.announced = self.phase = 0

    def add(self, arrivals=0, announced=0):
        with self.changed:
            self.missing -= arrivals
            self.announced += announced
            assert self.missing >= 0, "more arrivals than a phase has"
            if self.missing == self.announced == 0:
                self.phase, self.missing = self.phase + 1, self.count
            self.changed.notify_all()

    def wait(self, parity):
        with self.changed:
            over = self.changed.wait_for(lambda: self.given_up or self.phase & 1 != int(parity), PATIENCE)
            assert over and not self.given_up, "waits without end"


class Shared:
    """Shared memory, or a part of it."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.dtype, self.shape = tensor, tensor.dtype, tensor.shape

    def index(self, place):
        assert 0 <= int(place) < len(self.tensor)
        return Shared(self.tensor[int(place)])

    def slice(self, start, length, dim=0):
        return Shared(self.tensor.narrow(dim, start, length))

    def permute(self, order):
        return Shared(self.tensor.permute(order))

    def load(self, layout):
        return self.tensor.clone()

    def store(self, value):
        assert value.dtype == self.dtype
        self.tensor.copy_(value)

    def reinterpret(self, dtype, shape, layout):
        return Shared(self.tensor.view(-1).view(dtype).view(shape))


class Products(threading.local):
    """Of each warpgroup, those it has not waited for, the oldest first."""

    def __init__(self):
        self.pending = []

    def start(self, a, b, acc, use_acc=True, is_async=True):
        result = torch.full_like(acc, float("nan"))
        values = lambda x: (x.tensor if isinstance(x, Shared) else x).float()  # noqa: E731
        self.pending.append(lambda: result.copy_(values(a) @ values(b) + (acc if use_acc else 0)))
        return result

    def wait(self, left, deps):
        for _ in range(len(self.pending) - left):
            self.pending.pop(0)()
        return deps if len(deps) > 1 else deps[0]


class CopyEngine:
    """Brings what it is asked for later, and in any order."""

    def __init__(self, seed: int):
        self.random, self.asked, self.closed = random.Random(seed), [], False
        self.thread = threading.Thread(target=self.work)
        self.thread.start()

    def load(self, descriptor, place, bar, buffer):
        row, column = map(int, place)
        assert column * descriptor.matrix.element_size() % 16 == 0, "a copy begins between multiples of 16 bytes"
        buffer.tensor.view(torch.uint8).fill_(255)
        with Barrier.changed:
            self.asked.append((descriptor, row, column, bar, buffer.tensor))
            Barrier.changed.notify_all()

    def work(self):
        while True:
            with Barrier.changed:
                Barrier.changed.wait_for(lambda: self.asked or self.closed)
                if self.closed:
                    return
                descriptor, row, column, bar, target = self.asked.pop(self.random.randrange(len(self.asked)))
            part = descriptor.matrix[row:, column:][: target.shape[0], : target.shape[1]]
            target.view(torch.uint8).zero_()
            target[: part.shape[0], : part.shape[1]] = part
            bar.add(announced=-descriptor.block_type.nbytes)

    def close(self):
        with Barrier.changed:
            self.closed = True
            Barrier.changed.notify_all()
        self.thread.join()


def allocate(dtype, shape, layout):
    if layout == "barriers":
        ring = [Barrier() for _ in range(shape[0])]
        return ring[0] if len(shape) == 1 else SimpleNamespace(index=lambda place: ring[int(place)])
    tensor = torch.empty(shape, dtype=dtype)
    tensor.view(torch.uint8).fill_(255)
    return Shared(tensor)


def store(pointer: Pointer, value, mask):
    offset, mask, value = torch.broadcast_tensors(pointer.offset, mask, value)
    pointer.data[offset[mask].long()] = value[mask]


def run_in_threads(functions):
    """Each function with its arguments in a thread of its own; what one raises is raised."""
    faults = []
    Barrier.given_up = False

    def run(function, arguments):
        try:
            function(*arguments)
        except BaseException as fault:
            faults.append(fault)
            with Barrier.changed:
                Barrier.given_up = True
                Barrier.changed.notify_all()

    threads = [threading.Thread(target=run, args=pair) for pair in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


def stand_ins(program: int, engine: CopyEngine) -> dict:
    products, no_layout = Products(), lambda *arguments, **options: None
    language = SimpleNamespace(**vars(LANGUAGE))
    language.where = lambda condition, x, y: torch.where(
        condition, *(torch.as_tensor(v, dtype=torch.float32) if isinstance(v, float) else v for v in (x, y))
    )
    language.zeros = lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype)
    language.full = lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype)
    language.max, language.min = (lambda x, axis: x.amax(axis)), (lambda x, axis: x.amin(axis))
    language.convert_layout, language.zeros_like = (lambda x, layout: x), torch.zeros_like
    language.expand_dims, language.exp2, language.log2 = torch.unsqueeze, torch.exp2, torch.log2
    language.float32, language.store = torch.float32, store
    language.allocate_shared_memory = allocate
    language.program_id = lambda axis: torch.tensor(program, dtype=torch.int32)
    language.warp_specialize = lambda functions, warps, registers: run_in_threads(functions)
    for name in ("SliceLayout", "DotOperandLayout", "NVMMADistributedLayout", "SwizzledSharedLayout", "static_assert"):
        setattr(language, name, no_layout)
    language.NVMMASharedLayout = SimpleNamespace(get_default_for=no_layout)
    barriers = SimpleNamespace(
        MBarrierLayout=lambda: "barriers",
        init=Barrier.init,
        wait=Barrier.wait,
        arrive=lambda bar, count: bar.add(arrivals=count),
        expect=lambda bar, announced: bar.add(arrivals=1, announced=announced),
    )
    return {
        "gl": language, "mbarrier": barriers, "bulk_load": engine.load, "warpgroup_mma": products.start,
        "warpgroup_mma_wait": products.wait, "reinterpret": Shared.reinterpret, "barrier": no_layout,
        "fence_async_shared": no_layout, "program_wait": no_layout, "program_release": no_layout,
    }  # fmt: skip


def as_pointers(value):
    """Tensors as the kernel has them."""
    if isinstance(value, torch.Tensor):
        last = value.untyped_storage().nbytes() // value.element_size() - value.storage_offset()
        pointer = Pointer(value.as_strided((last,), (1,)))
        pointer.dtype = SimpleNamespace(element_ty=value.dtype)
        return pointer
    if hasattr(value, "_fields"):
        return type(value)(*map(as_pointers, value))
    if hasattr(value, "block_shape"):
        base, block = value.base, value.block_shape
        nbytes = block[0] * block[1] * base.element_size()
        return SimpleNamespace(
            matrix=base.as_strided(value.shape, value.strides), dtype=base.dtype, layout=None,
            block_type=SimpleNamespace(nbytes=nbytes),
        )  # fmt: skip
    return value


def launch(device, kernel, grid, *arguments, **options):
    """In place of `device_mlra.launch`: the Hopper kernel here, others as always."""
    if kernel is not decode_triton_mlra.rows_kernel:
        return REAL_LAUNCH(device, kernel, grid, *arguments, **options)
    modules = decode_copies_mlra, decode_widening_mlra, decode_hopper_mlra
    names = [*kernel.arg_names][len(arguments) :]
    for program in range(grid[0]):
        engine = CopyEngine(seed=program)
        scope = {name: value for module in modules for name, value in vars(module).items()}
        scope |= {n: types.FunctionType(f.fn.__code__, scope, n) for n, f in scope.items() if hasattr(f, "fn")}
        scope |= stand_ins(program, engine)
        try:
            scope["rows_kernel"](*map(as_pointers, arguments), *(options.get(name) for name in names))
        finally:
            engine.close()
    return None


REAL_LAUNCH = decode_triton_mlra.launch

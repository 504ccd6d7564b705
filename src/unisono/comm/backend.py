# mypy: disable-error-code="override, assignment"
"""The arena as a torch.distributed backend: ``init_process_group("arena")`` for any program on one host.

Collectives that block run in the calling thread. Those that return a handle run on a thread of the group, in order.
Point-to-point messages move on by themselves (see `comm.channels`).
"""

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, Work

from unisono.comm.channels import CHANNEL_BYTES, Channels, Request
from unisono.comm.flat import Flat, as_bytes, as_memory, check_same, cut, flattened
from unisono.comm.meeting import LOOK_EVERY_S, Meeting, MeetingError, meeting_layout
from unisono.comm.reduce_operations import combining, finish_average, is_sum
from unisono.comm.registration import NAME
from unisono.comm.sharing import share
from unisono.comm.waiting import wake_on_time
from unisono.comm.work import ArenaWork


class ArenaGroup(dist.ProcessGroup):
    """A process group over an arena.

    Arguments:
        store: of this group alone.
        timeout: how long an operation may take that sets no time of its own.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # torch's stubs know one of its constructors
        wake_on_time()
        self._rank, self._size = rank, size
        self._timeout_s = timeout.total_seconds()
        layout = meeting_layout(size, CHANNEL_BYTES)
        arena = share(store, rank, size, layout.regions.size_bytes, self._timeout_s)
        self._channels = Channels(arena, layout.regions.named["channels"], rank, size)
        self._meeting = Meeting(arena, layout, rank, self._channels.move)
        self._meeting.begin(self._timeout_s)
        self._executor: ThreadPoolExecutor | None = None
        self._queued = 0
        self._counting = threading.Lock()
        self._done = ArenaWork([])
        self._done.finish()
        self._closed = False
        self._name = ""
        weakref.finalize(self, _release, self._channels, self._meeting)

    def getBackendName(self) -> str:  # torch's name
        """The backend's name."""
        return NAME

    def size(self) -> int:
        """Number of ranks."""
        return self._size

    def _set_group_name(self, name: str) -> None:
        """Called by torch.distributed, once."""
        self._name = name

    @property
    def group_name(self) -> str:
        """The name that the group is registered under: functional collectives and device meshes look it up."""
        return self._name

    def getGroupName(self) -> str:  # torch's name
        """As `group_name`."""
        return self._name

    # Collectives

    def allreduce(self, tensors: Any, opts: Any = None, timeout: timedelta | None = None) -> Work:
        """Combine a tensor over all ranks."""
        tensors, combine = _listed(tensors), combining(opts)

        def run(deadline: float) -> None:
            for tensor in tensors:
                if tensor.is_sparse:
                    self._sum_sparse(tensor, opts, deadline)
                    continue
                with Flat(tensor, out=True) as flat:
                    self._meeting.all_reduce(flat, combine, deadline)
                    finish_average(flat, opts, self._size)

        return self._run(run, tensors, opts, timeout)

    def _sum_sparse(self, tensor: Tensor, opts: Any, deadline: float) -> None:
        """Everyone's indices and values to all, and their sum."""
        if not is_sum(opts):
            raise MeetingError("sparse tensors can be summed only")
        own = tensor.detach().coalesce()
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self._size)]
        count = torch.tensor([own._nnz()])
        self._meeting.all_gather([as_bytes(c) for c in counts], as_bytes(count), deadline)
        most = max(int(c) for c in counts)
        parts = []
        for given in (own.indices().T.contiguous(), own.values()):
            padded = given.new_zeros(most, *given.shape[1:])
            padded[: given.shape[0]] = given
            everyone = [torch.empty_like(padded) for _ in counts]
            outputs = [as_bytes(flattened(t)) for t in everyone]
            self._meeting.all_gather(outputs, as_bytes(flattened(padded)), deadline)
            parts.append(torch.cat([t[: int(c)] for t, c in zip(everyone, counts, strict=True)]))
        total = torch.sparse_coo_tensor(parts[0].T, parts[1], tensor.shape).coalesce()
        tensor.copy_(total)

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Work:
        """Combine several tensors."""
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: Any, opts: Any = None, op: Any = None, timeout: timedelta | None = None) -> Work:
        """Combine a tensor into the root's."""
        tensors = _listed(tensors)
        root = opts if isinstance(opts, int) else opts.rootRank
        how = op if isinstance(opts, int) else opts
        combine = combining(how)

        def run(deadline: float) -> None:
            with Flat(tensors[0], out=self._rank == root) as flat:
                self._meeting.reduce(flat, root, combine, deadline)
                if self._rank == root:
                    finish_average(flat, how, self._size)

        return self._run(run, tensors, opts, timeout)

    def broadcast(self, tensors: Any, opts: Any = None, timeout: timedelta | None = None) -> Work:
        """The root's tensor to all."""
        tensors = _listed(tensors)
        root = opts if isinstance(opts, int) else opts.rootRank

        def run(deadline: float) -> None:
            for tensor in tensors:
                with Flat(tensor, out=self._rank != root) as flat:
                    self._meeting.broadcast(as_bytes(flat), root, deadline)

        return self._run(run, tensors, opts, timeout)

    def allgather(
        self, output_tensors: Any, input_tensors: Any, opts: Any = None, timeout: timedelta | None = None
    ) -> Work:
        """Everyone's tensor to all."""
        outputs = output_tensors if isinstance(input_tensors, Tensor) else output_tensors[0]
        given = _listed(input_tensors)[0]

        def run(deadline: float) -> None:
            check_same(given, outputs, self._size)
            flats = [Flat(out, out=True) for out in outputs]
            self._meeting.all_gather([as_bytes(f.flat) for f in flats], as_bytes(flattened(given)), deadline)
            for flat in flats:
                flat.close()

        return self._run(run, list(outputs), opts, timeout)

    def all_gather_single(self, output: Tensor, given: Tensor, opts: Any = None) -> Work:
        """Everyone's tensor to all, behind each other in one."""

        def run(deadline: float) -> None:
            if output.numel() != given.numel() * self._size:
                raise MeetingError(
                    f"all_gather of {given.numel()} elements on {self._size} ranks needs an output of "
                    f"{given.numel() * self._size}, not {output.numel()}"
                )
            with Flat(output, out=True) as flat:
                outputs = list(as_bytes(flat).view(self._size, -1))
                self._meeting.all_gather(outputs, as_bytes(flattened(given)), deadline)

        return self._run(run, [output], opts)

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Work:
        """Several of `all_gather_single`."""
        return _last(self.all_gather_single(o, i, opts) for o, i in zip(outputs, inputs, strict=True))

    def allgather_coalesced(self, output_lists: Any, input_list: Any, opts: Any = None) -> Work:
        """Several of `allgather`; ``output_lists[rank][i]`` receives ``input_list[i]`` of a rank."""
        columns = zip(*output_lists, strict=True)
        return _last(self.allgather([list(c)], [i], opts) for c, i in zip(columns, input_list, strict=True))

    def gather(
        self, output_tensors: Any, input_tensors: Any, opts: Any = None, timeout: timedelta | None = None
    ) -> Work:
        """Everyone's tensor to the root."""
        given = _listed(input_tensors)[0]
        outputs = list(output_tensors[0]) if output_tensors else []

        def run(deadline: float) -> None:
            if outputs:
                check_same(given, outputs, self._size)
            flats = [Flat(out, out=True) for out in outputs]
            self._meeting.gather([as_bytes(f.flat) for f in flats] or None, as_bytes(flattened(given)), deadline)
            for flat in flats:
                flat.close()

        return self._run(run, outputs, opts, timeout)

    def scatter(
        self, output_tensors: Any, input_tensors: Any, opts: Any = None, timeout: timedelta | None = None
    ) -> Work:
        """The root's tensors, one to each rank."""
        output = _listed(output_tensors)[0]
        inputs = list(input_tensors[0]) if input_tensors else []
        root = opts if isinstance(opts, int) else opts.rootRank

        def run(deadline: float) -> None:
            if inputs:
                check_same(output, inputs, self._size)
            given = [as_bytes(flattened(tensor)) for tensor in inputs] if self._rank == root else None
            with Flat(output, out=True) as flat:
                self._meeting.scatter(as_bytes(flat), given, root, deadline)

        return self._run(run, [output], opts, timeout)

    def reduce_scatter(
        self, output_tensors: Any, input_tensors: Any, opts: Any = None, timeout: timedelta | None = None
    ) -> Work:
        """Combine the tensors for each rank, and give each its own."""
        output = _listed(output_tensors)[0]
        inputs = input_tensors if isinstance(input_tensors[0], Tensor) else input_tensors[0]
        check_same(output, inputs, self._size)
        return self._reduce_scatter(output, [flattened(tensor) for tensor in inputs], opts, timeout)

    def reduce_scatter_single(self, output: Tensor, given: Tensor, opts: Any = None) -> Work:
        """The same from one tensor that holds all of them."""
        flat = flattened(given)
        if flat.numel() != output.numel() * self._size:
            raise MeetingError(
                f"reduce_scatter into {output.numel()} elements on {self._size} ranks needs an input of "
                f"{output.numel() * self._size}, not {flat.numel()}"
            )
        return self._reduce_scatter(output, list(flat.view(self._size, -1)), opts, None)

    def _reduce_scatter(self, output: Tensor, inputs: Sequence[Tensor], opts: Any, timeout: timedelta | None) -> Work:
        combine = combining(opts)

        def run(deadline: float) -> None:
            with Flat(output, out=True) as flat:
                self._meeting.reduce_scatter(flat, inputs, combine, deadline)
                finish_average(flat, opts, self._size)

        return self._run(run, [output], opts, timeout)

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Work:
        """Several of `reduce_scatter_single`."""
        return _last(self.reduce_scatter_single(o, i, opts) for o, i in zip(outputs, inputs, strict=True))

    def alltoall(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> Work:
        """A tensor from each rank to each."""
        outputs, inputs = list(output_tensors), list(input_tensors)

        def run(deadline: float) -> None:
            flats = [Flat(out, out=True) for out in outputs]
            self._meeting.all_to_all(
                [as_bytes(f.flat) for f in flats], [as_bytes(flattened(tensor)) for tensor in inputs], deadline
            )
            for flat in flats:
                flat.close()

        return self._run(run, outputs, opts)

    def all_to_all_single(
        self,
        output: Tensor,
        given: Tensor,
        output_split_sizes: Sequence[int],
        input_split_sizes: Sequence[int],
        opts: Any = None,
    ) -> Work:
        """The same from one tensor into one, cut along the first dimension."""

        def run(deadline: float) -> None:
            with Flat(output, out=True) as flat:
                outputs = cut(flat, output, output_split_sizes, self._size, "output")
                inputs = cut(flattened(given), given, input_split_sizes, self._size, "input")
                self._meeting.all_to_all([as_bytes(t) for t in outputs], [as_bytes(t) for t in inputs], deadline)

        return self._run(run, [output], opts)

    def barrier(self, opts: Any = None, timeout: timedelta | None = None) -> Work:
        """Return when all ranks have come."""
        return self._run(self._meeting.barrier, [], opts, timeout)

    # What the methods were called before torch 2.13

    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    # Messages

    def send(self, tensors: Sequence[Tensor], dst_rank: int, tag: int = 0) -> Work:
        """Send a tensor."""
        request = Request(dst_rank, tag, as_memory(flattened(tensors[0])))
        work = self._message_work(tensors, request, f"send to rank {dst_rank} (tag {tag})")
        request.finished = lambda: work.finish(request.error)
        self._channels.send(request)
        return work

    def recv(self, tensors: Sequence[Tensor], src_rank: int, tag: int = 0) -> Work:
        """Receive a tensor."""
        target = Flat(tensors[0], out=True)
        request = Request(src_rank, tag, as_memory(target.flat))
        sender = f"rank {src_rank}" if src_rank >= 0 else "any rank"
        work = self._message_work(tensors, request, f"recv from {sender} (tag {tag})")

        def finished() -> None:
            work.source = request.peer
            if request.error is None:
                target.close()
            work.finish(request.error)

        request.finished = finished
        self._channels.receive(request)
        return work

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int = 0) -> Work:
        """Receive a tensor from whoever sends one first."""
        return self.recv(tensors, -1, tag)

    def _message_work(self, tensors: Sequence[Tensor], request: Request, operation: str) -> ArenaWork:
        """A handle whose waiting moves messages on, and notices a dead peer."""
        channels, meeting = self._channels, self._meeting
        looked = 0.0

        def idle(work: ArenaWork) -> None:
            nonlocal looked
            channels.move()
            now = time.monotonic()
            if request.peer >= 0 and now - looked > LOOK_EVERY_S:
                looked = now
                try:
                    meeting.check_alive(request.peer, operation)
                except MeetingError as error:
                    channels.move(waits=True)  # what it sent before it ended still counts
                    channels.cancel(request, error)

        def late() -> MeetingError:
            error = MeetingError(f"{operation} on rank {self._rank} was not over within {self._timeout_s:g} s")
            channels.cancel(request, error)
            return error

        return ArenaWork(list(tensors), time.monotonic() + self._timeout_s, idle, late)

    # How operations run

    def _run(
        self, run: Callable[[float], None], result: list[Tensor], opts: Any, timeout: timedelta | None = None
    ) -> Work:
        """Here and now where the caller will wait anyway, else on the group's thread, in the order of calls."""
        given = timeout if timeout is not None else getattr(opts, "timeout", None)
        seconds = given.total_seconds() if given is not None else -1.0
        deadline = time.monotonic() + (seconds if seconds > 0 else self._timeout_s)
        if not getattr(opts, "asyncOp", True) and self._queued == 0:
            with self._meeting.whole():
                run(deadline)
            return self._done
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="unisono-arena", initializer=_like_its_maker())
        work = ArenaWork(result)
        with self._counting:
            self._queued += 1

        def perform() -> None:
            error: BaseException | None = None
            try:
                with torch.no_grad(), self._meeting.whole():
                    run(deadline)
            except BaseException as caught:
                error = caught
            with self._counting:
                self._queued -= 1
            work.finish(error)

        self._executor.submit(perform)
        return work

    def abort(self) -> None:
        """End what is under way, with an error, and let go of everything."""
        self._meeting.break_up("the group was aborted")
        self.shutdown()

    def shutdown(self) -> None:
        """Let what is under way end, and let go of the threads."""
        if not self._closed:
            self._closed = True
            if self._executor is not None:
                self._executor.shutdown(wait=True)
            _release(self._channels, self._meeting)


def _release(channels: Channels, meeting: Meeting) -> None:
    channels.close()
    meeting.close()


def _like_its_maker() -> Callable[[], None]:
    """A thread's intra-op threads are its own setting."""
    count = torch.get_num_threads()
    return lambda: torch.set_num_threads(count)


def _listed(tensors: Any) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _last(works: Any) -> Work:
    """The last of several, once the others are over."""
    *others, last = list(works)
    for work in others:
        work.wait()
    return last  # type: ignore[no-any-return]

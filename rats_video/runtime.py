"""The processes of a run, as one of them sees it, and their collective operations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from rats_video.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")
GIB = 2**30
PATIENCE = timedelta(hours=2)  # how long a reward rank waits for a slow teacher, and all ranks for a checkpoint
_BUCKET_ELEMENTS = 64 * 2**20  # 256 MB of float32 travel at once: few messages, little extra memory


@dataclass(frozen=True)
class Runtime:
    """One of the processes that share a run; by default the only one, for which nothing here waits or changes a value.

    The first `trainers` ranks hold the denoiser, `context` neighbours at a time sharing their clips; the ranks after
    them only hold reward models and take no part in what the trainers do together.

    Args:
        device: where this process computes.
        rank: which process this is.
        trainers: processes that hold the denoiser.
        context: processes that share each clip.
        reward_ranks: processes that only hold reward models.
        mesh: the trainers as `[data, 1, context]`, the last two by diffusers' names; None for a process on its own.
        everyone: the trainers in a row.
        links: the pair of each trainer with its reward rank, by trainer.
        savers: the trainers, over the network of the CPUs: for a thread that writes while they train.
    """

    device: torch.device
    rank: int = 0
    trainers: int = 1
    context: int = 1
    reward_ranks: int = 0
    mesh: DeviceMesh | None = None
    everyone: DeviceMesh | None = None
    links: tuple[dist.ProcessGroup, ...] = ()
    savers: dist.ProcessGroup | None = None

    @staticmethod
    def join(device: torch.device, *, context: int = 1, reward_ranks: int = 0) -> Runtime:
        """This process's place among those of the initialised process group, of which all must call this.

        Raises:
            UserError: the processes cannot be split that way.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        trainers = world - reward_ranks
        if trainers < 1:
            raise UserError(
                f"{reward_ranks} of {world} processes leave none to train", where="parallel.reward_ranks",
                fix="start more: rats-video distill --gpus N --nodes M",
            )  # fmt: skip
        if trainers % context:
            raise UserError(
                f"{trainers} training processes are no multiple of {context}", where="parallel.context",
                fix="start more: rats-video distill --gpus N --nodes M",
            )  # fmt: skip
        if world == 1:
            return Runtime(device)
        # A mesh makes process groups, which all processes make together, the reward ranks too.
        ranks = torch.arange(trainers)
        mesh = DeviceMesh(device.type, ranks.view(-1, 1, context), mesh_dim_names=("data", "ring", "ulysses"))
        everyone = DeviceMesh(device.type, ranks, mesh_dim_names=("trainers",))
        links = tuple(
            dist.new_group([trainer, trainers + trainer % reward_ranks])
            for trainer in range(trainers if reward_ranks else 0)
        )
        network = "gloo" if device.type == "cuda" else None  # on a CPU the default is of CPUs
        savers = dist.new_group(list(range(trainers)), backend=network, timeout=PATIENCE)
        return Runtime(device, dist.get_rank(), trainers, context, reward_ranks, mesh, everyone, links, savers)

    @property
    def is_main(self) -> bool:
        """True on rank 0, which alone writes files and prints."""
        return self.rank == 0

    @property
    def serves_reward(self) -> bool:
        """True on a process that only holds reward models."""
        return self.rank >= self.trainers

    @property
    def _group(self) -> dist.ProcessGroup:
        assert self.everyone is not None
        return self.everyone.get_group()

    # -------------------------------------------------------------------------------------------------- sharing work

    def rows(self, batch_size: int, where: str = "training.batch_size") -> slice:
        """This rank's rows of a global batch, whose size is set at `where`; a context group has the same ones.

        Raises:
            UserError: they cannot be shared evenly.
        """
        shares = self.trainers // self.context
        if batch_size % shares:
            raise UserError(
                f"{batch_size} clips cannot be shared evenly by {shares} processes", where=where,
                fix=f"use a multiple of {shares}",
            )  # fmt: skip
        size = batch_size // shares
        first = self.rank // self.context * size
        return slice(first, first + size)

    def shard(self, count: int) -> range:
        """This rank's indices of `count` independent pieces of work."""
        return range(self.rank, count, self.trainers)

    def gather_shards(self, mine: Sequence[T]) -> list[T]:
        """All ranks' results of `shard`, in the order of the work."""
        return interleave(self.gather(list(mine)))

    def equal_share(self, count: int) -> list[int]:
        """This context group's indices of `count` clips: as many as any other group's, so some may come twice.

        So all ranks make the same number of calls, as split weights require.
        """
        each = -(-count // (self.trainers // self.context))
        first = self.rank // self.context * each
        return [index % count for index in range(first, first + each)]

    def of_groups(self, values: Sequence[T]) -> Sequence[T]:
        """One value a context group, from the values of all ranks."""
        return values[:: self.context]

    # ---------------------------------------------------------------------------------------------------- agreement

    def gather(self, value: T) -> list[T]:
        """The value of every rank, by rank."""
        if self.trainers == 1:
            return [value]
        values: list[T] = [value] * self.trainers
        dist.all_gather_object(values, value, group=self._group)
        return values

    def gather_to_main(self, value: T) -> list[T]:
        """The value of every rank, by rank, on the main one; nothing elsewhere."""
        if self.trainers == 1:
            return [value]
        values: list[T] | None = [value] * self.trainers if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def broadcast(self, value: T) -> T:
        """The main rank's value on all ranks."""
        return self.gather(value)[0]

    def barrier(self) -> None:
        """Wait until all ranks call it."""
        if self.trainers > 1:
            dist.barrier(group=self._group)

    def any(self, flag: bool) -> bool:  # noqa: FBT001
        """True if `flag` is true on any rank."""
        return self.all_reduce_mean({"flag": float(flag)})["flag"] > 0

    def all_reduce_mean(self, row: Mapping[str, float]) -> dict[str, float]:
        """The mean of each value over ranks; NaN if it is NaN on any."""
        if self.trainers == 1:
            return dict(row)
        values = torch.tensor(list(row.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(values, group=self._group)
        return dict(zip(row, (values / self.trainers).tolist(), strict=True))

    def mean_over_context(self, part: Tensor) -> Tensor:
        """The mean over the processes that share a clip, on each of them.

        Each passes gradient on to its own part alone, so that the sum over processes is the gradient, as
        `average_gradients` has it.
        """
        if self.context == 1:
            return part
        assert self.mesh is not None
        total = part.detach().clone()
        dist.all_reduce(total, group=self.mesh["ulysses"].get_group())
        return (part + (total - part).detach()) / self.context

    def average_gradients(self, weights: Iterable[nn.Parameter]) -> None:
        """Turn every rank's gradient into that of the global batch's mean loss, in place.

        Not torch's DistributedDataParallel: its hooks expect one forward through the wrapper for each backward, and we
        call the denoiser once a solver step and by its own name. Adapters are small, so overlap would gain little.
        The ranks of a context group hold parts that add up to the gradient of their clips.
        """
        if self.trainers == 1:
            return
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        for gradient in gradients:
            if is_split(gradient) and self.context > 1:  # FSDP has taken the mean over all trainers
                gradient.mul_(self.context)
        plain = [gradient for gradient in gradients if not is_split(gradient)]
        for bucket in _buckets(plain):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat, group=self._group)
            flat *= self.context / self.trainers
            parts = flat.split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])

    def close(self) -> None:
        """Leave the process group; call nothing here after it."""
        if dist.is_initialized():
            dist.destroy_process_group()


ALONE = Runtime(torch.device("cpu"))


def is_split(tensor: Tensor) -> TypeGuard[DTensor]:
    """True if each process holds a shard of the tensor."""
    if not dist.is_initialized():  # then it cannot be, and the import takes a second
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def interleave(parts: Sequence[Sequence[T]]) -> list[T]:
    """The first of every part, then the second of every part, and so on; undoes `Runtime.shard`."""
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def _buckets(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors of one dtype, in order, in lists of a bounded number of elements."""
    buckets: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        if not buckets or size + tensor.numel() > _BUCKET_ELEMENTS or buckets[-1][0].dtype != tensor.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.numel()
    return buckets

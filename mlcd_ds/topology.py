"""Who am I among the processes. The only file that reads RANK, WORLD_SIZE and their like from the environment."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from mlcd_ds.errors import ConfigError, PeerError


@dataclass(frozen=True)
class Topology:
    """One process's place: built once, passed down to whatever communicates.

    `group` is None for torch's default process group, or when world_size is 1 (then no collective is ever called).
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    group: object | None = None

    @staticmethod
    def single(device: str | torch.device = "cpu") -> "Topology":
        """One process alone."""
        return Topology(0, 1, 0, 1, torch.device(device))

    @staticmethod
    def from_environment() -> "Topology":
        """Reads what the launcher (deepspeed, torchrun) wrote; one process alone without a launcher.

        Starts nothing: call `start()` before the first collective.
        """

        def number(name: str, default: int) -> int:
            text = os.environ.get(name, str(default))
            if not text.lstrip("-").isdigit():
                raise ConfigError(f"environment variable {name}={text!r} is not a whole number; is a launcher running?")
            return int(text)

        rank, world_size = number("RANK", 0), number("WORLD_SIZE", 1)
        if not 0 <= rank < world_size:
            raise ConfigError(f"RANK={rank} does not fit WORLD_SIZE={world_size}: start all ranks with one launcher")
        local_rank = number("LOCAL_RANK", 0)
        local_world_size = number("LOCAL_SIZE", number("LOCAL_WORLD_SIZE", world_size))
        use_cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") != "cpu"
        device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
        return Topology(rank, world_size, local_rank, local_world_size, device)

    @staticmethod
    def on_this_machine(rank: int, world_size: int, store: Path) -> "Topology":
        """One of `world_size` processes of this machine that meet in the file `store`; joins their group.

        One GPU each (NCCL) where there are enough of them, else CPUs (gloo over loopback).
        """
        use_cuda = torch.cuda.device_count() >= world_size
        device = torch.device("cuda", rank) if use_cuda else torch.device("cpu")
        if use_cuda:
            torch.cuda.set_device(device)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        file = dist.FileStore(str(store), world_size)
        backend = "nccl" if use_cuda else "gloo"
        dist.init_process_group(backend, store=file, rank=rank, world_size=world_size)
        return Topology(rank, world_size, rank, world_size, device)

    @staticmethod
    def enter_rank(rank: int, world_size: int, port: int) -> None:
        """Makes this process a rank as a launcher on this machine would; CPUs alone. For processes that were forked."""
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_SIZE": world_size}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
        os.environ.update({name: str(value) for name, value in place.items()})

    @staticmethod
    def pretended(world_size: int) -> "Topology":
        """Rank 0 of `world_size` ranks that are not there, on the CPU: collectives return at once, what they return means
        nothing. For counting.
        """
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        return Topology(0, world_size, 0, world_size, torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """True on the rank that prints, logs and publishes."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """True when there is somebody to talk to."""
        return self.world_size > 1

    def start(self, timeout_minutes: float) -> "Topology":
        """Joins the process group of all ranks (gloo on CPUs, NCCL on GPUs), whose waits end after `timeout_minutes`.

        A process alone joins a group of one: DeepSpeed's engine wants a group even then. Raises ConfigError where the port
        at which the ranks meet is in use, PeerError where they do not meet.
        """
        if not self.is_distributed:
            os.environ.setdefault("LOCAL_RANK", "0")  # without a launcher; DeepSpeed insists on it
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            store = None if self.is_distributed else dist.HashStore()
            timeout = timedelta(minutes=timeout_minutes)
            with _naming_the_meeting(self, timeout_minutes):
                dist.init_process_group(
                    backend, store=store, rank=self.rank, world_size=self.world_size, timeout=timeout
                )
        return self

    def use_compile_cache(self, folder: str | Path) -> str:
        """Lets torch.compile keep its code in `folder`, or where TORCHINDUCTOR_CACHE_DIR says; the folder that counts."""
        return os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(folder).absolute()))

    def seed_torch(self, seed: int, step: int = 0) -> None:
        """Seeds torch's global generators, differently on each rank; torch alone would seed them from the clock.

        step: where a run goes on that cannot have the states it was stopped with.
        """
        torch.manual_seed((seed + step * 0x9E3779B1) * self.world_size + self.rank)

    def stop(self) -> None:
        """Leaves the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def _naming_the_meeting(topology: Topology, timeout_minutes: float) -> Iterator[None]:
    """Says in our words why the ranks could not meet."""
    try:
        yield
    except dist.DistError as error:
        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                f"the ranks cannot meet at {host}:{port}: port {port} is in use, perhaps by another run. Give the launcher "
                "another one (deepspeed --master_port PORT), or end that run."
            ) from error
        raise PeerError(
            f"rank {topology.rank} of {topology.world_size} has not met the others at {host}:{port} within "
            f"{timeout_minutes:g} minutes ({str(error).strip().splitlines()[0]}): is a host down, its name or a firewall in "
            "the way, or were fewer ranks started?"
        ) from error


@contextlib.contextmanager
def longer_waits(minutes: float, afterwards: float) -> Iterator[None]:
    """Within it the waits of all process groups are bounded by `minutes`, after it by `afterwards`."""
    set_timeout_of_every_group(minutes)
    try:
        yield
    finally:
        set_timeout_of_every_group(afterwards)


def set_timeout_of_every_group(timeout_minutes: float) -> None:
    """Bounds the waits of all process groups that exist now.

    `init_process_group(timeout=)` bounds the default group alone; ZeRO makes groups of its own, with torch's 30 minutes.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=timeout_minutes), group)

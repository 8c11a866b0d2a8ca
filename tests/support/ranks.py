"""Processes over gloo, forked from the test process, which has imported everything."""

import datetime

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bissl_zoo.distributed import barrier


def on_ranks(work, worlds, folder):
    """Return `{world: [work(rank, world) for each rank]}`; the worlds run side by side."""
    running = [
        mp.start_processes(_run, (work, world, folder), nprocs=world, join=False, start_method="fork")
        for world in worlds
    ]
    for processes in running:
        while not processes.join():
            pass
    return {
        world: [torch.load(folder / f"{world}_{rank}.pt", weights_only=True) for rank in range(world)]
        for world in worlds
    }


def _run(rank, work, world, folder):
    torch.set_num_threads(1)
    if world > 1:
        timeout = datetime.timedelta(seconds=60)
        meeting = f"file://{folder}/meeting{world}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=timeout)
    torch.save(work(rank, world), folder / f"{world}_{rank}.pt")
    if world > 1:
        barrier()
        dist.destroy_process_group()

"""A step of several processes: bytes that each sends, and how much of the averaging the backward pass hides.

$ python -m benchmarks.processes [--processes 2] [--device cuda]

Three sides take turns in all processes at the same time: the step without averaging, after which the processes wait for
each other; the step of `torchrun`; and the averaging of all gradients alone. A process has one thread, or one GPU.
"""

from __future__ import annotations

import socket
import statistics

import pyro
import torch
from torch import distributed, multiprocessing

from benchmarks.comparison import chosen, time_in_turns
from benchmarks.steps import SIZES, Scene, Step
from dwp_pyro.priors.blocks import kernel_sites

_ROUNDS = 40
_BUCKET = 2**20 * 25 // 4  # numbers that DDP averages at a time


def _size(scene: Scene) -> int:
    """Return the number of trained numbers of a mean-field posterior: means, log-scales and weights without a site."""
    network = scene.network()
    kernels = sum(w.numel() for w in kernel_sites(network).values())
    return sum(w.numel() for w in network.parameters()) + kernels


def _measure(rank: int, processes: int, device: torch.device, port: int) -> None:
    torch.set_num_threads(1)
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    for widths, patch in SIZES[device.type]:
        scene = Scene(widths, patch, device)
        with pyro.get_param_store().scope(), pyro.validation_enabled(False):
            alone = scene.bayesian("isotropic", "weight-sample")
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            distributed.init_process_group(
                backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes
            )
            together = scene.bayesian("isotropic", "weight-sample")
            gradients = torch.zeros(_size(scene), device=device).split(_BUCKET)

            def average(gradients: tuple[torch.Tensor, ...] = gradients) -> None:
                for bucket in gradients:
                    distributed.all_reduce(bucket)

            def wait_for_all(step: Step = alone) -> None:
                step()
                distributed.barrier()

            sides = {"alone": wait_for_all, "together": together, "averaging": average}
            seconds = time_in_turns(sides, _ROUNDS, device)
            distributed.barrier()
            distributed.destroy_process_group()
        if rank == 0:
            alone_ms, together_ms, averaging_ms = (statistics.median(each) * 1e3 for each in seconds.values())
            sent = 2 * (processes - 1) / processes * 4 * _size(scene) / 1e6
            hidden = 1 - (together_ms - alone_ms) / averaging_ms
            print(
                f"| {'-'.join(map(str, widths))}, {patch}³ | {processes} | {sent:.1f} MB | {alone_ms:.0f} ms | "
                f"{averaging_ms:.0f} ms | {together_ms:.0f} ms | {together_ms / alone_ms:.2f} | {hidden:.0%} |",
                flush=True,
            )
        port += 1


def main() -> None:
    arguments = chosen(processes=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    print("| network, patch | processes | each sends | step alone | averaging | step | × alone | hidden |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    multiprocessing.spawn(_measure, (arguments.processes, arguments.device, port), arguments.processes)


if __name__ == "__main__":
    main()

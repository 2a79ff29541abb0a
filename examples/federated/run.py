"""Multiply the posteriors of three sites that share a prior, with Flower on this machine.

    pip install 'dwp-pyro[federated]'
    python examples/federated/run.py

A server and three sites run as processes of their own. Their scans are generated: multiple sclerosis at the server,
which fits the prior to them, and tumors at the sites. Each site infers a posterior from its own scans, and sends that.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from dwp_pyro import FitPriorConfig, RunOptions, fit_prior
from dwp_pyro.data.phantom import write_phantoms

APP = Path(__file__).parent
SITES = 3
SHAPE, SPACING = (32, 32, 32), 4.5  # of the scans


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until a process listens on a port."""
    while process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise RuntimeError(f"{process.args} ended; its log says why")


def write_data(out: Path, sites: int) -> None:
    """Write the scans of the server's prior, of the common test and of each site, of which three are for training."""
    write_phantoms("ms", out / "server" / "source", 8, seed=0, shape=SHAPE, spacing=SPACING)
    first, *rest = write_phantoms("brats", out / "server" / "test", 10, seed=1, shape=SHAPE, spacing=SPACING)
    split = {"train": [first], "validation": rest, "test": []}  # a split needs a training case
    (out / "server" / "test.json").write_text(json.dumps(split))
    for site in range(1, sites + 1):
        write_phantoms("brats", out / f"site{site}" / "scans", 5, seed=1 + site, shape=SHAPE, spacing=SPACING)


def run_app(out: Path, sites: int, steps: int) -> None:
    """Start a server and sites on free ports of this machine, run the app, and stop them."""
    programs = Path(sys.executable).parent
    port = free_port()
    home = out / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(f'[superlink.loopback]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",  # Flower's programs start others by name
    }
    server = ["flower-superlink", "--insecure", "--disable-runtime-dependency-installation", f"--port={port}"]
    commands = {"server": server}
    for site in range(1, sites + 1):
        link = [f"--superlink=127.0.0.1:{port}", f"--port={free_port()}"]
        own = f'--node-config=folder="{out / f"site{site}"}"'
        commands[f"site{site}"] = ["flower-supernode", "--insecure", *link, own]
    settings = f'folder="{out / "server"}" sites={sites} steps={steps}'
    with ExitStack() as stack:
        for name, (program, *options) in commands.items():
            log = stack.enter_context((out / f"{name}.log").open("w"))
            process = subprocess.Popen([programs / program, *options], env=environment, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            if name == "server":
                wait_for(port, process)
        run = [programs / "flwr", "run", APP, "loopback", "--stream", f"--run-config={settings}"]
        subprocess.run(run, env=environment, check=True)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description="Multiply the posteriors of three sites, with Flower on this machine.")
    parser.add_argument("--out", default=Path("runs/federated"), type=Path, help="Output folder, new.")
    parser.add_argument("--widths", default="4,8,16,32", help="Channels at the four resolutions of the network.")
    parser.add_argument("--prior-steps", default=300, type=int, help="Steps of the server's source network.")
    parser.add_argument("--steps", default=300, type=int, help="Steps of each site.")
    args = parser.parse_args(arguments)

    out = args.out.resolve()
    write_data(out, SITES)
    prior = FitPriorConfig(
        root=str(out / "server" / "source"),
        family="gaussian",
        widths=tuple(map(int, args.widths.split(","))),
        bootstraps=1,
        steps=args.prior_steps,
        validation=1,
        patch=SHAPE[0],
        batch_size=1,
        spacing=SPACING,
    )
    fit_prior(prior, RunOptions(out / "server" / "prior", device="cpu"))
    run_app(out, SITES, args.steps)
    result = out / "server" / "dice.json"
    if not result.exists():
        raise SystemExit(f"{out}: the app failed; the log of each process is there")
    dice: dict[str, float] = json.loads(result.read_text())
    print("Dice of the common test scans:", ", ".join(f"{name} {value:.3f}" for name, value in dice.items()))
    return dice


if __name__ == "__main__":
    main()

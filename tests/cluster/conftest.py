"""Slurm with one node on this machine, and the scripts of the documentation."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from dwp_pyro.data.phantom import write_phantoms

GUIDE = Path(__file__).parents[2] / "docs" / "how-to" / "resume-and-cluster.md"
# Daemons are in /usr/sbin, dwp-pyro and dask beside the interpreter; jobs inherit the environment.
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin",
    "OMP_NUM_THREADS": "1",
}

# A requeued job waits for the lifetime of its credential; 5 seconds are the minimum.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
MpiDefault=none
StateSaveLocation={folder}
SlurmdSpoolDir={folder}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs=4
PartitionName=normal Nodes={host} Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes={host} PriorityTier=2
"""


def wait_until(condition: Callable[[], object], folder: Path) -> None:
    """Wait at most five minutes; a failure shows the logs in a folder."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))
        time.sleep(0.2)


class Slurm:
    """Controller and one node of four cores, in a folder.

    Args:
        folder: Folder of the configuration, states and logs.
        daemons: Stack that stops the daemons.
    """

    def __init__(self, folder: Path, daemons: ExitStack) -> None:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            second.bind(("127.0.0.1", 0))
            ports = first.getsockname()[1], second.getsockname()[1]
        host, config = socket.gethostname().split(".")[0], folder / "slurm.conf"
        config.write_text(CONFIG.format(host=host, ports=ports, user=getpass.getuser(), folder=folder))
        key = folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        self.folder, self.environment = folder, ENVIRONMENT | {"SLURM_CONF": str(config)}
        files = {"key-file": key, "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        # Other users can enter the folder of pytest only by force.
        munged = ["munged", "--foreground", "--force", *(f"--{name}={folder / file}" for name, file in files.items())]
        for command in (munged, ["slurmctld", "-D", "-i"], ["slurmd", "-D"]):
            daemons.callback(self._stop, self._start(command))
        wait_until(lambda: "idle" in self.call("sinfo", check=False), folder)
        daemons.callback(self._cancel_jobs)

    def _start(self, command: list[str]) -> subprocess.Popen:
        with open(self.folder / f"{command[0]}.log", "w") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, env=self.environment)

    @staticmethod
    def _stop(daemon: subprocess.Popen) -> None:
        daemon.terminate()
        daemon.wait(60)

    def _cancel_jobs(self) -> None:
        self.call("scancel", "--user", getpass.getuser())
        wait_until(lambda: not self.call("squeue", "--noheader"), self.folder)

    def call(self, *command: str, check: bool = True, folder: Path | None = None, script: str = "") -> str:
        """Return what a command of Slurm prints."""
        result = subprocess.run(command, input=script, capture_output=True, text=True, cwd=folder, env=self.environment)
        assert result.returncode == 0 or not check, result.stderr
        return result.stdout

    def submit(self, script: str, folder: Path) -> str:
        """Return the id of a new job, which writes job.log."""
        return self.call("sbatch", "--parsable", "--output=job.log", folder=folder, script=script).strip()

    def preempt(self) -> None:
        """Submit a job that needs the whole node at once."""
        self.call("sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", script="#!/bin/bash\n")

    def job(self, job: str) -> dict[str, str]:
        """Return the fields of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", job)))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    missing = [
        name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=ENVIRONMENT["PATH"])
    ]
    if missing:
        pytest.skip(f"no {missing[0]}; install the Debian packages slurm-wlm and munge")
    with ExitStack() as daemons:
        yield Slurm(tmp_path_factory.mktemp("slurm"), daemons)


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    write_phantoms("brats", folder, 9, shape=(28, 32, 28))
    return folder


def documented_script(command: str, replaced: dict[str, str]) -> str:
    """Return the script of the guide that contains a command, with words replaced."""
    scripts = re.findall(r"^```\n(#!/bin/bash\n.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    (script,) = [script for script in scripts if command in script]
    for old, new in replaced.items():
        assert old in script
        script = script.replace(old, new)
    return script

"""`python -m dwp_pyro`, and `torchrun -m dwp_pyro`."""

from dwp_pyro.cli import main

if __name__ == "__main__":
    main(prog_name="dwp-pyro")

"""Commands on kernel priors: score-prior, inspect-prior and merge-prior."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dwp_pyro.commands.console import print_rows, print_tables
from dwp_pyro.commands.options import PATH, overwrite, seed_option
from dwp_pyro.config.training import PRETRAINED, named_prior

__all__ = ["inspect_prior", "merge_prior", "score_prior"]


_prior = click.argument("prior", type=PATH, callback=lambda _context, _parameter, prior: named_prior(str(prior)))


@click.command("score-prior")
@_prior
@click.option("--kernels", type=PATH, required=True, help="Kernels: a .safetensors bank or an .npy array.")
@click.option("--samples", type=click.IntRange(min=1), default=500, show_default=True, help="Samples K of the bound.")
@seed_option("Seed of the bound's samples.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def score_prior(prior: Path, kernels: Path, samples: int, seed: int, as_json: bool) -> None:
    """Compute the log-density of kernels under a PRIOR, in nats per kernel.

    PRIOR is the folder of a prior, or pretrained for that of the package.

    For comparison, the result includes N(0, 1) on each weight, and an isotropic and a full-covariance Gaussian of the
    kernels that the prior was fitted to.
    """
    from dwp_pyro.evaluation.score_prior import score_prior as score

    result = score(prior, kernels, samples=samples, seed=seed)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        nats = result["nats_per_kernel"]
        print_rows(
            ["kernels", *(name.replace("_", " ") for name in nats)],
            [[str(result["kernels"]), *(f"{value:.2f}" for value in nats.values())]],
        )


@click.command("inspect-prior")
@_prior
@click.option("--out", type=PATH, help="Folder of the plots.  [default: runs/inspect-PRIOR]")
def inspect_prior(prior: Path, out: Path | None) -> None:
    """Show the card of a PRIOR and plot it.

    PRIOR is the folder of a prior, or pretrained for that of the package.

    The plots show samples beside the kernels that the prior was fitted to (if its folder has them), mean kernels along
    the most used latent dimensions (of VAEs), and outputs of networks with sampled kernels for a generated scan.
    """
    from dwp_pyro.evaluation.inspect_prior import inspect_prior as run
    from dwp_pyro.priors.model_card import model_card

    name = "pretrained" if prior == PRETRAINED else prior.resolve().name
    kernel_prior, pictures = run(prior, out or Path("runs") / f"inspect-{name}")
    print_tables(model_card(kernel_prior))
    click.echo()
    for what, path in pictures.items():
        click.echo(f"{what}: {path}")


@click.command("merge-prior")
@click.argument("priors", type=PATH, nargs=-1, required=True)
@click.option(
    "--out", type=PATH, default=Path("runs/prior-merged"), show_default=True, help="Folder of the merged prior."
)
@seed_option("Seed of samples and fits.")
@overwrite
def merge_prior(priors: tuple[Path, ...], out: Path, seed: int, overwrite: bool) -> None:
    """Merge PRIORS of several sites into one, without their kernels or images.

    A merged Gaussian equals the fit to the kernels of all sites; other families are fitted again to samples of all
    priors. The merged prior has no source network: use it with svi --center none.
    """
    from dwp_pyro.priors.merge import merge_priors
    from dwp_pyro.priors.model_card import model_card
    from dwp_pyro.priors.pack import save_pack
    from dwp_pyro.runtime.run_folder import RunFolder

    if len(priors) < 2:
        raise click.UsageError("give at least two priors")
    settings = {"priors": [str(prior) for prior in priors], "seed": seed}
    folder = (out, "merge-prior", settings)
    RunFolder.check(*folder, resume=False, overwrite=overwrite)
    prior, moments = merge_priors(priors, seed)
    with RunFolder.start(*folder, resume=False, overwrite=overwrite) as run:
        save_pack(run.path, prior, moments)
    print_tables(model_card(prior))
    click.echo(f"Prior: {out}")

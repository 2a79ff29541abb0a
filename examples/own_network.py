"""Train a MONAI network under a deep weight prior, with stock Pyro.

The network, the input and the training loop are plain MONAI, nibabel and Pyro code. The package adds the prior over the
3x3x3 kernels, the likelihood and the guide. The scans are generated: multiple sclerosis as the source, tumors as the
target. For real scans, replace `read_scans`; for a prior made by `dwp-pyro fit-prior`, pass its folder as --prior-dir.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import nibabel
import pyro
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet
from pyro.distributions import Bernoulli
from pyro.infer import SVI, Predictive, TraceMeanField_ELBO
from torch import Tensor, nn

from dwp_pyro import KernelPrior, MeanFieldNormal, SegmentationModel, bayesianize
from dwp_pyro.data.phantom import write_phantoms
from dwp_pyro.densities import BlockKernels
from dwp_pyro.densities.fit_density import fit_density
from dwp_pyro.priors.blocks import by_block, kernel_sites, prior_blocks
from dwp_pyro.priors.kernel_prior import BlockInfo

Scan = tuple[Tensor, Tensor, Tensor]  # image, label and brain mask, [1, 1, X, Y, Z] each


def make_network() -> nn.Module:
    return BasicUNet(in_channels=1, out_channels=2, features=(8, 8, 16, 16, 16, 8), upsample="nontrainable")


def read_scans(folder: Path, flair: str, label: str) -> list[Scan]:
    """Read the FLAIR scans below a folder, normalized to mean 0 and variance 1 in the brain, and their labels."""
    scans = []
    for path in sorted(folder.rglob(f"*_{flair}.nii.gz")):
        files = path, path.with_name(path.name.replace(flair, label))
        image, lesion = (torch.tensor(nibabel.load(f).get_fdata(), dtype=torch.float32)[None, None] for f in files)
        brain_mask = image > 0
        inside = image[brain_mask]
        scans.append(((image - inside.mean()) / inside.std() * brain_mask, (lesion > 0).long(), brain_mask.float()))
    return scans


def fit_kernel_prior(scans: list[Scan], steps: int) -> KernelPrior:
    """Train a source network, then fit a variational autoencoder to the kernels of each of its prior blocks."""
    network, loss = make_network(), DiceCELoss(softmax=True, to_onehot_y=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.004)
    for step in range(steps):
        image, label, _ = scans[step % len(scans)]
        optimizer.zero_grad()
        loss(network(image), label).backward()
        optimizer.step()
    weights, densities, infos = kernel_sites(network), {}, {}
    for block, sites in by_block(prior_blocks(network)).items():
        kernels = torch.cat([weights[site].detach().flatten(0, 1) for site in sites])
        numbers = torch.arange(len(kernels))
        data = BlockKernels(kernels, bootstraps=torch.zeros_like(numbers), identities=numbers)  # of one source network
        densities[block], nats = fit_density("dwp", data, steps, seed=0)
        infos[block] = BlockInfo(sites, len(kernels), nats)
        print(f"block {block}: {len(kernels)} kernels, held-out log-density {nats['prior']:.1f} nats per kernel")
    return KernelPrior("dwp", densities, infos).requires_grad_(False)


def score(logits: Tensor, label: Tensor, brain_mask: Tensor) -> dict[str, float]:
    """Score the posterior predictive of a scan over its brain; logits [S, 1, 2, X, Y, Z], one per weight sample."""
    inside = brain_mask[0, 0] > 0
    samples, truth = logits.softmax(2)[:, 0, 1, inside], label[0, 0, inside] > 0
    probability = samples.mean(0)
    predicted, entropy = probability > 0.5, Bernoulli(probability).entropy()
    return {
        "Dice": float(2 * (predicted & truth).sum() / (predicted.sum() + truth.sum()).clamp_min(1)),
        "NLL": float(nn.functional.binary_cross_entropy(probability, truth.float())),
        "entropy": float(entropy.mean()),
        "mutual information": float((entropy - Bernoulli(samples).entropy().mean(0)).mean()),
    }


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description="Train a MONAI network under a deep weight prior, with stock Pyro.")
    parser.add_argument("--prior-dir", type=Path, help="Folder made by fit-prior.  [default: fit a prior first]")
    parser.add_argument("--prior-steps", default=100, type=int, help="Steps of the source network and each density.")
    parser.add_argument("--cases", default=5, type=int, help="Training scans.")
    parser.add_argument("--steps", default=250, type=int, help="Steps of variational inference.")
    parser.add_argument("--samples", default=20, type=int, help="Weight samples of the posterior predictive.")
    parser.add_argument("--seed", default=0, type=int, help="Seed of the scans and of Pyro.")
    args = parser.parse_args(arguments)

    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        for dataset, cases in (("ms", 4), ("brats", args.cases + 3)):
            write_phantoms(dataset, Path(folder, dataset), cases, args.seed, shape=(32, 32, 32))
        source = read_scans(Path(folder, "ms"), "FLAIR", "consensus_gt")
        target = read_scans(Path(folder, "brats"), "flair", "seg")
    train, test = target[: args.cases], target[args.cases :]

    prior = KernelPrior.load(args.prior_dir) if args.prior_dir else fit_kernel_prior(source, args.prior_steps)
    network = make_network()
    guide = MeanFieldNormal(bayesianize(network, prior))
    model = SegmentationModel(network, "dice-ce", num_cases=len(train), evidence=50_000)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.004}), TraceMeanField_ELBO())
    for step in range(args.steps):
        loss = svi.step(*train[step % len(train)])
        if step % 50 == 0:
            print(f"step {step}: loss {loss:.4g} nats")
    predictive = Predictive(network, guide=guide, num_samples=args.samples, return_sites=["_RETURN"])
    scores = [score(predictive(image)["_RETURN"], label, brain_mask) for image, label, brain_mask in test]
    means = {name: sum(each[name] for each in scores) / len(scores) for name in scores[0]}
    print(f"{len(test)} test scans:", ", ".join(f"{name} {value:.3f}" for name, value in means.items()))
    return means


if __name__ == "__main__":
    main()

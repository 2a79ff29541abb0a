"""The server: send the common start, receive a posterior from each site, multiply them, and compare on test scans."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp
from packs import POSTERIOR, START, pack, sizes, svi_config, unpack

from dwp_pyro.inference.multiply import multiply_posteriors
from dwp_pyro.inference.posterior import Posterior
from dwp_pyro.training.network_training import validation_dice
from dwp_pyro.training.svi import gaussian_prior
from dwp_pyro.training.training_data import load_training_data

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    folder = Path(str(context.run_config["folder"]))
    while len(nodes := sorted(grid.get_node_ids())) < int(context.run_config["sites"]):
        time.sleep(0.2)
    start = pack(folder / "prior", START)
    wire = {"server": sizes(start)}  # sender → what it sent
    posteriors = {}
    for reply in grid.send_and_receive([Message(start, dst_node_id=node, message_type="train") for node in nodes]):
        site = f"site{1 + nodes.index(reply.metadata.src_node_id)}"  # in the order of Flower's random node ids
        if reply.has_error():
            raise RuntimeError(f"{site}: {reply.error.reason}")
        wire[site] = sizes(reply.content)
        unpack(reply.content, folder / site, POSTERIOR)
        posteriors[site] = Posterior.load(folder / site / POSTERIOR[0])
    posteriors = dict(sorted(posteriors.items()))
    (folder / "wire.json").write_text(json.dumps(wire))

    config = replace(svi_config(context, folder / "test", folder / "prior"), split=str(folder / "test.json"), n=1)
    prior = gaussian_prior(config, posteriors["site1"].network_config)
    product = multiply_posteriors(posteriors, prior)
    product.save(folder / "product.safetensors")
    test = load_training_data(config, config.n)
    dice = {
        name: validation_dice(posterior, test, torch.device("cpu"))
        for name, posterior in ({"prior": prior} | posteriors | {"product": product}).items()
    }
    (folder / "dice.json").write_text(json.dumps(dice))

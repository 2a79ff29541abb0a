"""A site: infer a posterior from the site's own scans, under the prior that the server sends."""

from __future__ import annotations

import logging
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from packs import POSTERIOR, START, pack, svi_config, unpack

from dwp_pyro import RunOptions, svi

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    folder = Path(str(context.node_config["folder"]))
    try:
        unpack(message.content, folder / "prior", START)
        config = svi_config(context, folder / "scans", folder / "prior")
        svi(config, RunOptions(folder / "run", device="cpu", overwrite=True))
    except Exception:
        # Flower sends the message of an exception to the server; it may name cases.
        logging.exception("training failed")
        raise RuntimeError("training failed; the log of the site says why") from None
    return Message(pack(folder / "run", POSTERIOR), reply_to=message)

"""Command line `dwp-pyro`. Torch is imported only when a command runs."""

from __future__ import annotations

from typing import Any, Literal

import click

from dwp_pyro import __version__
from dwp_pyro.commands.process import tune_process

tune_process()  # must precede the import of torch

from dwp_pyro.commands import apply, compare, kernel_priors, scans, train  # noqa: E402
from dwp_pyro.commands.console import exit_with_error, set_up_logging  # noqa: E402
from dwp_pyro.commands.hints import hint  # noqa: E402
from dwp_pyro.runtime.errors import Interrupted, UserError  # noqa: E402
from dwp_pyro.runtime.signals import interrupt_on_signal  # noqa: E402

__all__ = ["main"]


class _Group(click.Group):
    """Group that reports user errors in one line, with exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with interrupt_on_signal():
                return super().invoke(ctx)
        except UserError as error:
            exit_with_error("; ".join(filter(None, (str(error), hint(error, self._options(ctx))))), 2)
        except click.UsageError as error:
            if ctx.params["log_format"] != "json":
                raise  # click prints the usage
            set_up_logging("json", quiet=ctx.params["quiet"])  # not done yet if there is no such command
            exit_with_error(error.format_message(), error.exit_code)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            exit_with_error(f"{where}{error.strerror or error}", 2)
        except Interrupted as stop:
            has_option = stop.resumable and "--resume" in self._options(ctx)
            remedy = "resume with --resume" if has_option else "run the same command again to resume"
            exit_with_error(f"{stop}; {remedy}", 128 + stop.signum)

    def _options(self, ctx: click.Context) -> set[str]:
        """Return the options of the invoked command."""
        command = self.commands[ctx.invoked_subcommand or ""]
        return {option for parameter in command.params for option in parameter.opts}


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="dwp-pyro")
@click.option("--quiet", is_flag=True, envvar="DWP_PYRO_QUIET", show_envvar=True, help="Print only results and errors.")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    envvar="DWP_PYRO_LOG_FORMAT",
    show_envvar=True,
    help="Format of progress, messages and errors: text, or one JSON object per line on standard error.",
)
def main(quiet: bool, log_format: Literal["text", "json"]) -> None:
    """Bayesian knowledge transfer for 3D medical segmentation.

    Convolution kernels learned on one disease become a prior for another: fit-prior learns the prior
    from a large source data set, svi infers a network from 5 to 20 target scans with this prior, and
    predict segments scans with uncertainty maps. Start with: dwp-pyro demo
    """
    set_up_logging(log_format, quiet=quiet)


for _command in (
    compare.demo,
    scans.phantom,
    scans.check_data,
    train.fit_prior,
    train.svi,
    train.finetune,
    apply.predict,
    apply.evaluate,
    apply.report,
    apply.export,
    compare.experiment,
    kernel_priors.score_prior,
    kernel_priors.inspect_prior,
    kernel_priors.merge_prior,
):
    main.add_command(_command)

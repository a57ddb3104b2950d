"""The command `serve`: a protected model behind HTTP on one machine, by FastAPI and uvicorn."""

from __future__ import annotations

from pathlib import Path

import click

from honeytrace.console import FILE, Refused, one_of, refusing

# Everything heavy is imported where it is used, as in cli.py.


def add_to(group: click.Group) -> None:
    """Hang the command into the command line."""
    group.add_command(serve)


@click.command()
@click.option("--model", required=True, help="package.module:factory or file.py:factory.")
@click.option("--weights", type=FILE, help="The model's weights, safetensors.")
@click.option("--watermark", "watermark_file", type=FILE, required=True, help="File written by protect.")
@click.option("--graded-only", is_flag=True, help="Leave the flips out.")
@click.option(
    "--answers",
    type=click.Choice(["probabilities", "logits", "labels"]),
    default="probabilities",
    show_default=True,
)
@click.option("--constant-time", is_flag=True, help="Time does not tell which answers are bent. CPU only.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Interface to listen on.")
@click.option("--port", type=int, default=8000, show_default=True, help="0 takes a free one.")
@click.option("--metrics-port", type=int, help="For Prometheus, on 127.0.0.1 only.  [default: no metrics]")
@click.option("--max-rows", type=int, default=256, show_default=True, help="Inputs in a request.")
@click.option("--max-bytes", type=int, help="Of a request's body.  [default: what the inputs can need]")
@click.option("--batch-rows", type=int, default=64, show_default=True, help="Inputs in one pass.")
@click.option("--device", default="cpu", show_default=True, help="Where the model runs.")
@click.option("--threads", type=int, help="Of PyTorch.  [default: PyTorch's choice]")
def serve(
    model: str,
    weights: Path | None,
    watermark_file: Path,
    graded_only: bool,
    answers: str,
    constant_time: bool,
    host: str,
    port: int,
    metrics_port: int | None,
    max_rows: int,
    max_bytes: int | None,
    batch_rows: int,
    device: str,
    threads: int | None,
) -> None:
    """Serve a protected model over HTTP: POST /classify with {"inputs": [...]}, until interrupted.

    Metrics go to a port of their own: whoever reads them learns which answers are bent.
    """
    with refusing():
        try:
            import uvicorn

            from honeytrace.serving.http import create_app
        except ModuleNotFoundError as error:
            raise Refused(f'serving needs {error.name}: pip install "honeytrace[serve]"') from error
        except ImportError as error:  # of the module above, which says what is missing
            raise Refused(str(error)) from error
        from honeytrace.serving import Limits, PrometheusMetrics, ServiceSpec

        spec = ServiceSpec(
            model=model,
            watermark=watermark_file,
            weights=weights,
            graded_only=graded_only,
            device=device,
            threads=threads,
            settings={
                "answers": one_of(answers, "probabilities", "logits", "labels"),
                "constant_time": constant_time,
                "batch_rows": batch_rows,
                "limits": Limits(rows=max_rows, bytes=max_bytes),
            },
        )
        metrics = None
        if metrics_port is not None:
            metrics = PrometheusMetrics()
            metrics.listen(metrics_port)
        app = create_app(spec.load(metrics=metrics))
        uvicorn.run(app, host=host, port=port, log_level="info", access_log=False, server_header=False)

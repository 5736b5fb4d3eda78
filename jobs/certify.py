"""How good a run is, measured several times with other samples: do the certificates agree within their errors?

    python -m jobs.certify run.zarr --times 4 --workers 8

The last certificate is kept in the run; all are printed, and their mean, whose error is smaller.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer

import distot
from distot.console import start
from jobs.demo import say


def main(
    run: Annotated[str, typer.Argument(metavar="RUN.zarr")],
    times: Annotated[int, typer.Option(min=1, help="Certificates, each from samples of its own.")] = 4,
    workers: Annotated[int | None, typer.Option(min=1, help="Run on that many Ray workers.")] = None,
    ray: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Ray cluster to run on, or auto.")] = None,
) -> None:
    """Certify a run several times."""
    found = []
    for step in range(1, times + 1):
        found.append(distot.certify(run, seed_step=step, workers=workers, ray=ray).certificate)
        its = found[-1]
        say(
            f"{step}: chi2 {its.chi2:.5f} ± {its.chi2_error:.5f}, W2² ≥ {its.w2_squared_bound:.6g} ± "
            f"{its.w2_squared_bound_error:.2g}"
        )
    chi2, error = (np.array([getattr(its, name) for its in found]) for name in ("chi2", "chi2_error"))
    say(f"mean: chi2 {chi2.mean():.5f} ± {np.sqrt((error**2).sum()) / times:.5f}")


if __name__ == "__main__":
    start(main)

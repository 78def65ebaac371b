"""`tuco-jax score`: the TuCo of every prompt in a file."""

import time

from common_jax.cli.command_line import one_line
from tuco_jax.scoring.options import ScoreFileOptions as Config

__all__ = ["Config", "run"]

_STARTED = time.perf_counter()  # the program's, but for reading the command line


def run(config: Config) -> None:
    """Score, write the table, and say what was written and how long it took."""
    from tuco_jax.scoring.score_file import score_file

    meta = score_file(config, started=_STARTED)
    seconds = ", ".join(f"{name} {value:.2f}" for name, value in meta["seconds"].items())
    resumed = f" ({meta['resumed_rows']} from the journal)" if meta["resumed_rows"] else ""
    for note in meta["notes"]:
        print(f"note: {one_line(note)}")
    print(f"{meta['rows']} prompts{resumed}, {meta['tokens']} tokens: {config.out}")
    print(f"mean TuCo {meta['mean_tuco']:.4f}, telescoping error {meta['telescoping_error']:.1e}")
    print(f"seconds: {seconds}")

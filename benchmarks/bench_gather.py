"""(j) What one gather for queries, keys and values together could save.

    python benchmarks/bench_gather.py [--device cpu] [--rounds 15] [--tiny] [--out FILE]

SBoRA-FA gathers r columns of a layer's input, in other places for queries, keys and values. Here are the three gathers
apart and in one, and the time of the three layers' products forward and backward, of which the difference is a share.
"""

from collections.abc import Callable
from typing import Any

import torch
from bench_common import Device, Out, Rounds, Tiny, compared, new_app, prepare, save, take_turns

SHAPES = ((128, 3328), (320, 4096), (640, 1024), (1280, 256))  # width, tokens
RANKS = (8, 32)

app = new_app()


@app.command()
def main(device: Device = "cpu", rounds: Rounds = 15, tiny: Tiny = False, out: Out = None) -> None:
    """Measure, and save the numbers."""
    target = prepare(device)
    rows = []
    for width, tokens in ((32, 16),) if tiny else SHAPES:
        for rank in RANKS[:1] if tiny else RANKS:
            times = take_turns(ways(width, tokens, rank, target), rounds, target)
            ms = {row["way"]: row["ms"] for row in compared(times)}
            saved = 100 * (ms["apart"] - ms["together"]) / (ms["products"] + ms["apart"])
            about = {"width": width, "tokens": tokens, "rank": rank}
            rows.append(about | {f"{way}, ms": value for way, value in ms.items()} | {"saved, %": round(saved, 2)})
    save("gather", target, rows, out, rounds=rounds, tiny=tiny)


def ways(width: int, tokens: int, rank: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Three gathers, one of as many columns, and the six products of three layers."""
    x, weight = torch.randn(tokens, width, device=device), torch.randn(width, width, device=device)
    together = torch.randperm(width, device=device)[: 3 * rank]
    apart = together.split(rank)
    return {
        "apart": lambda: [x.index_select(1, index) for index in apart],
        "together": lambda: x.index_select(1, together),
        "products": lambda: [x @ weight.t() for _ in range(3)] + [x @ weight for _ in range(3)],
    }


if __name__ == "__main__":
    app()

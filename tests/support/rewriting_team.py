"""One process of several that train a rewriting head together; started by the tests with torchrun's variables set."""

import json
import sys
from pathlib import Path

import torch

from metaprune.metanet.rewrite_training import RewriteCourse, Source, trained_head
from metaprune.metanet.team import joined
from tests.support.little_zoo import task_of

NAMES = ("plain-0", "chain-0")
COURSE = RewriteCourse(
    hidden=8, layers=1, masks=2, batches=1, size=64, steps=6, every=3, networks=4, memory=0.5, rate=1e-2
)


def sources() -> list[Source]:
    return [Source(name, name.split("-")[0], lambda name=name: task_of(name)) for name in NAMES]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with joined() as team:
        head, about = trained_head(sources(), COURSE, 0, folder, team)
    told = {"history": about["history"], "rank": team.rank, "size": team.size}
    told["weights"] = [float(value.double().sum()) for value in head.state_dict().values()]
    (folder / f"told-{team.rank}.json").write_text(json.dumps(told))

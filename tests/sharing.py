"""What processes that ``torchrun`` starts do together: a program for ``test_ranks``."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from small_networks import Stack, sequences
from structmat import Blast, LowRank, Refinement, compress_, make_plan
from structmat._ranks import AbandonedError, Ranks, Sums, together
from structmat.fit import Lee2024Blast

BATCHES = 37


def values(number: int) -> dict[str, Any]:
    """What is summed of one batch; some batches lack a part."""
    generator = torch.Generator().manual_seed(number)
    found: dict[str, Any] = {"x": torch.randn(5, 7, generator=generator) * 10 ** (number % 5), "count": number}
    return found if number % 3 else {**found, "seldom": torch.randn(2, generator=generator).double()}


def summed(ranks: Ranks) -> dict[str, Any]:
    """The sums over all batches."""
    sums = Sums()
    for number in ranks.mine(BATCHES):
        sums.add(number, values(number))
    return sums.total()


def compressed(folder: Path | None = None) -> dict[str, torch.Tensor]:
    """A network whose blocks are compressed in sequence and refined on steps of several batches."""
    torch.manual_seed(0)
    model = Stack(depth=3).eval()
    plan = make_plan(model, {".*up|.*down": Blast, ".*": LowRank}, keep=0.6, blocks=2)
    compress_(
        model, plan, batches=sequences(20), refine=Refinement(6, 1e-2, batches=4), two_sided=True, cache=folder,
        method=lambda format: Lee2024Blast(sweeps=4, metric_iterations=6) if isinstance(format, Blast) else None,
    )  # fmt: skip
    return model.state_dict()


def sent() -> dict[str, Any]:
    """An object with tensors of many kinds, one of them twice."""
    twice = torch.arange(6.0).view(2, 3)
    kinds = {str(dtype): torch.ones(3, dtype=dtype) for dtype in (torch.bool, torch.bfloat16, torch.int64)}
    odd = [torch.empty(0, 4), torch.tensor(2.5, dtype=torch.float64), torch.empty(3, device="meta"), twice.mT]
    return {"twice": (twice, twice), "kinds": kinds, "odd": odd, "text": "words", "format": LowRank(6, 4, 2)}


def failure(ranks: Ranks, owner: int, *, dealt: bool) -> str:
    """How each process learns of an error in one of them."""

    def fail(k: int) -> int:
        if ranks.rank == owner:
            raise ValueError("expected nothing")
        return k

    try:
        list(ranks.dealt([1.0] * ranks.size, fail)) if dealt else ranks.of(owner, lambda: fail(0))
    except (ValueError, AbandonedError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(folder: Path) -> None:
    """Do all of it; the first process writes what came out."""
    with together() as ranks:
        found = {
            "size": ranks.size,
            "ranks": ranks.gathered(ranks.rank),
            "of": ranks.of(ranks.size - 1, sent),
            "any": [ranks.any(False), ranks.any(ranks.rank == ranks.size - 1)],
            "merged": ranks.merged(dict.fromkeys(ranks.mine(6), ranks.rank)),
            "dealt": list(ranks.dealt([1.0, 5.0, 2.0, 2.0], lambda k: (k, ranks.rank))),
            "sums": summed(ranks),
            "failures": [ranks.gathered(failure(ranks, ranks.size - 1, dealt=dealt)) for dealt in (False, True)],
            "compressed": compressed(folder / "fits"),
        }
        same = ranks.gathered({name: tensor.clone() for name, tensor in found["compressed"].items()})
        found["agree"] = all(torch.equal(one[name], tensor) for one in same for name, tensor in same[0].items())
        if ranks.rank == ranks.size - 1:
            os._exit(0)  # without a word, as if it were killed
        try:
            ranks.gathered(ranks.rank)
        except ConnectionError as error:
            found["left"] = f"{type(error).__name__}: {error}"
        if ranks.leads:
            torch.save(found, folder / "found.pt")
        os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))

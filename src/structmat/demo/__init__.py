"""``structmat demo``: one trained network, compressed by every structure, and the speed of a layer of a real size."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

import torch

from structmat._files import write_atomically
from structmat._version import __version__
from structmat.bench import hardware
from structmat.demo.settings import Settings, plans_for, structures, usual_structures
from structmat.demo.speed import measure_speeds

try:
    from structmat.demo.accuracy import measure_accuracies
    from structmat.demo.show import draw, print_accuracies, print_speeds
    from structmat.demo.vit import VisionTransformer, digits
except ImportError as error:
    raise ImportError("the demo needs scikit-learn and matplotlib: pip install 'structmat[demo]'") from error

__all__ = ["Settings", "run_demo", "structures", "usual_structures"]


def run_demo(settings: Settings) -> dict[str, Any]:
    """Train, compress, retrain and time, and show the results.

    Everything that is printed also goes to ``results.json`` in the folder, beside ``trade_off.png``, ``couplings.png``
    (of BLAST) and ``structure.png`` (of Gaudi-GBLR). The network is trained on one thread, so that a seed gives the
    same accuracies on any number of cores; the layers are timed on all threads.

    Args:
        settings: What to do.

    Returns:
        The content of ``results.json``.

    Raises:
        ValueError: If no structure fits the budget.
    """
    plans, refused = plans_for(settings, VisionTransformer())
    settings.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = measure_accuracies(settings, plans)
    finally:
        torch.set_num_threads(threads)
    speeds, slow = measure_speeds(settings)
    print_accuracies(found, settings, len(digits().test_labels))
    if speeds:
        print_speeds(speeds, settings, threads)
    for (name, keep), reason in refused.items():
        print(f"{name} does not fit keep {keep:g}: {reason}")
    for name, reason in slow.items():
        print(f"{name} has no layer of a real size at keep {settings.keep:g}: {reason}")
    content = {
        "structmat": __version__,
        "torch": torch.__version__,
        "hardware": hardware(),
        "settings": settings.to_dict(),
        "seconds": time.perf_counter() - started,
        "results": [asdict(result) for result in (found.dense, *found.results.values())],
        "refused": [{"format": n, "keep": k, "reason": why} for (n, k), why in refused.items()],
        "speeds": [{**asdict(speed), "speedup": speed.speedup} for speed in speeds],
    }
    text = json.dumps(content, indent=1)
    write_atomically(settings.out / "results.json", lambda path: path.write_text(text, encoding="utf-8"))
    draw(found, settings)
    print(f"\nThe results and the pictures are in {settings.out}/, after {content['seconds']:.0f} seconds.")
    return content

"""What every test shares: fixed seeds, one thread, hypothesis without surprises, the folder of real data."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import torchvision_ops

collect_ignore = ["support", "third_party/btt.py"]  # programs that tests run, and a package that they install

torch.set_num_threads(1)
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported; kernels run without a GPU then
torchvision_ops.declare()
_support = [str(Path(__file__).parent / "support"), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _support))  # for processes that tests start
settings.register_profile("structmat", deadline=None, max_examples=25, derandomize=True, database=None)
settings.load_profile("structmat")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of trained weights and data sets; a test that asks for it is skipped where there is none."""
    if "STRUCTMAT_DATA" not in os.environ:
        pytest.skip("the environment variable STRUCTMAT_DATA, the folder with trained weights, is not set")
    return Path(os.environ["STRUCTMAT_DATA"]).resolve(strict=True)

"""The first steps from the first weights: what they give, and what they should give."""

import copy
from dataclasses import replace

import torch
from torch import Tensor

from bench.cudnn import cudnn
from bench.models.arms import SEED, Start
from bench.models.crew import Crew
from bench.models.settings import Setting
from bench.models.steps import Work

STEPS = 5


def first_results(work: Work, crew: Crew) -> Tensor:
    """The losses of first steps, or the logits of one, on the CPU; with the same random numbers for all."""
    torch.manual_seed(SEED + crew.rank)
    found = []
    for _ in range(STEPS if work.training else 1):
        work.step()
        found.append(work.result.detach().clone())
    return torch.stack(found).float().flatten().cpu()


def exact_results(begin: Start, setting: Setting, crew: Crew) -> Tensor:
    """The same in fp32, without TF32, with torch's batch norm."""
    work = Work(copy.deepcopy(begin.network), begin.x, begin.y, replace(setting, dtype="fp32"))
    if work.training:
        work.called = crew.shared(work.network)
    with cudnn(allow_tf32=False):
        return first_results(work, crew)
